// Images into a project: files, a folder or a zip, dropped or chosen, sent a few at a time.

import { ask } from "./api.js";
import { button, complain, h, put } from "./elements.js";
import { plural } from "./numbers.js";

const AT_ONCE = 8;

export function uploadPanel(project, done) {
  const files = h("input", {
    type: "file",
    multiple: true,
    accept: "image/*,.zip",
    hidden: true,
    testid: "upload-files",
    "aria-label": "Image files or a zip",
    onchange: () => take(files.files),
  });
  const folder = h("input", {
    type: "file",
    webkitdirectory: true,
    multiple: true,
    hidden: true,
    testid: "upload-folder",
    "aria-label": "Folder of images",
    onchange: () => take(folder.files),
  });
  const bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload" });
  const report = h("div.report", { testid: "upload-report", "aria-live": "polite" });
  const panel = h(
    "div.drop",
    { testid: "drop" },
    files,
    folder,
    h("p", {}, "Drop images, a folder's files or a zip here"),
    h(
      "div.row",
      {},
      button("choose-files", "Choose files", () => files.click(), { icon: "upload", kind: "primary" }),
      button("choose-folder", "Choose a folder", () => folder.click()),
    ),
    bar,
    report,
  );
  panel.addEventListener("dragover", (event) => {
    event.preventDefault();
    panel.classList.add("over");
  });
  panel.addEventListener("dragleave", () => panel.classList.remove("over"));
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    panel.classList.remove("over");
    take(event.dataTransfer.files);
  });

  async function take(chosen) {
    const wanted = [...chosen].filter(
      (file) => file.type.startsWith("image/") || /\.(zip|tiff?|bmp|webp)$/i.test(file.name),
    );
    const left = chosen.length - wanted.length;
    const total = { added: 0, duplicates: [], refused: [] };
    complain(panel, null);
    bar.hidden = false;
    try {
      for (let start = 0; start < wanted.length; start += AT_ONCE) {
        const form = new FormData();
        for (const file of wanted.slice(start, start + AT_ONCE))
          form.append("files", file, file.webkitRelativePath || file.name);
        const found = await ask("POST", `/projects/${project.id}/images`, { form });
        total.added += found.added.length;
        total.duplicates.push(...found.duplicates);
        total.refused.push(...found.refused);
        bar.value = Math.min(1, (start + AT_ONCE) / wanted.length);
      }
    } catch (error) {
      complain(panel, error);
    }
    bar.hidden = true;
    put(
      report,
      h(
        "p",
        {},
        `${plural(total.added, "image")} added`,
        total.duplicates.length ? `, ${total.duplicates.length} known already` : "",
        left ? `, ${plural(left, "file")} left out that are no images` : "",
        ".",
      ),
      total.refused.length
        ? h(
            "ul",
            {},
            total.refused.slice(0, 20).map((one) => h("li", { dir: "auto" }, `${one.name}: ${one.reason}`)),
          )
        : null,
    );
    if (total.added) done();
  }
  return panel;
}
