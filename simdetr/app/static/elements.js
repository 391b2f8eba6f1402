// Elements from data. Every string that comes from data goes through textContent or setAttribute, never through markup.

const SVG = "http://www.w3.org/2000/svg";

// h("p.muted", {testid: "note"}, "text", child): children may be strings, numbers, elements, arrays, null.
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name || "div");
  if (classes.length) element.className = classes.join(" ");
  return fill(element, attributes, children);
}

export function s(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElementNS(SVG, name);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  return fill(element, attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "testid") element.dataset.testid = value;
    else if (name === "style") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else if (name === "value" && "value" in element) element.value = value;
    else if (name === "checked") element.checked = true;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...nodes(children));
  return element;
}

const nodes = (children) =>
  children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : document.createTextNode(String(child))));

export function put(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

const SHAPES = {
  undo: "M5 7h6a3.5 3.5 0 0 1 0 7H7M5 7l3-3M5 7l3 3",
  redo: "M11 7H5a3.5 3.5 0 0 0 0 7h4M11 7 8 4m3 3-3 3",
  accept: "m3.5 8.5 3 3 6-7",
  reject: "m4.5 4.5 7 7m0-7-7 7",
  edit: "m3.5 12.5.6-2.6 6.3-6.3a1.3 1.3 0 0 1 2 2l-6.3 6.3z",
  remove: "M3.5 5h9M6.5 5V3.5h3V5m-5 0 .6 7.5h5.8L11.500 5",
  plus: "M8 3.500v9M3.500 8h9",
  minus: "M3.500 8h9",
  fit: "M3 6V3h3m4 0h3v3m0 4v3h-3m-4 0H3v-3",
  sun:
    "M8 5.500a2.500 2.500 0 1 0 0 5 2.500 2.500 0 0 0 0-5M8 1.500v1.600m0 9.800v1.600M1.500 " +
    "8h1.600m9.800 0h1.600M3.400 3.400l1.100 1.100m7 7 1.100 1.100m0-9.200-1.100 1.100m-7 7-1.100 1.100",
  moon: "M13 9.500A5.500 5.500 0 0 1 6.500 3 5.500 5.500 0 1 0 13 9.500",
  person: "M8 8a2.500 2.500 0 1 0 0-5 2.500 2.500 0 0 0 0 5m-5 5.500c.6-2.700 2.500-4 5-4s4.400 1.300 5 4",
  next: "m6 3.500 4.500 4.500L6 12.500",
  previous: "M10 3.500 5.500 8l4.500 4.500",
  download: "M8 2.500v7m0 0L5 6.700m3 2.800 3-2.800M3 13h10",
  upload: "M8 10V3m0 0L5 5.800M8 3l3 2.800M3 13h10",
  detect: "M3 6V3h3m4 0h3v3m0 4v3h-3m-4 0H3v-3m5-4.500v3M6.500 8h3",
  skip: "m3.500 4 4.500 4-4.500 4zM12 4v8",
  play: "M5 3.500v9l7-4.500z",
  pause: "M5 3.500h2v9H5zm4 0h2v9H9z",
  stop: "M4.500 4.500h7v7h-7z",
};

export function icon(name) {
  return s("svg.icon", { viewBox: "0 0 16 16", "aria-hidden": "true" }, s("path", { d: SHAPES[name] }));
}

export function button(testid, text, onclick, options = {}) {
  const { icon: shape, kind = "", title, key, ...rest } = options;
  return h(
    `button.button${kind ? "." + kind : ""}`,
    { type: "button", testid, title, onclick, ...rest },
    shape && icon(shape),
    text && h("span", {}, text),
    key && h("kbd", {}, key),
  );
}

export function iconButton(testid, shape, label, onclick, options = {}) {
  return h(
    "button.icon-button",
    { type: "button", testid, "aria-label": label, title: label, onclick, ...options },
    icon(shape),
  );
}

// A screen that has nothing yet says what to do next.
export function empty(title, text, ...actions) {
  return h(
    "section.empty",
    { testid: "empty" },
    h("h2", {}, title),
    h("p", {}, text),
    actions.length ? h("div.row", {}, actions) : null,
  );
}

export function field(label, input, note) {
  const id = input.id || (input.id = `f${++field.count}`);
  const box = h("div.field", {}, h("label", { for: id }, label), input);
  if (note) {
    const noteId = `${id}-note`;
    input.setAttribute("aria-describedby", noteId);
    box.append(h("p.note", { id: noteId }, note));
  }
  return box;
}
field.count = 0;

// Words about what went wrong, beside what caused it; null takes them away.
export function complain(place, error) {
  place.querySelector(":scope > .error")?.remove();
  if (!error) return;
  place.append(h("p.error", { role: "alert", testid: "error" }, error.message ?? String(error)));
}

// A modal dialog; resolves with what `close(value)` was given, null when it was escaped.
export function dialog(title, build, options = {}) {
  return new Promise((resolve) => {
    const titleId = `d${++field.count}`;
    let result = null;
    const box = h(`dialog${options.wide ? ".wide" : ""}`, {
      "aria-labelledby": titleId,
      testid: options.testid ?? "dialog",
    });
    const close = (value) => {
      result = value;
      box.close();
    };
    box.append(h("h2", { id: titleId }, title), build(close, box));
    box.addEventListener("close", () => {
      box.remove();
      resolve(result);
    });
    if (options.must) box.addEventListener("cancel", (event) => event.preventDefault());
    document.body.append(box);
    box.showModal();
  });
}

export function toast(text, kind = "") {
  const place = document.getElementById("toasts");
  const note = h(`p.toast${kind ? "." + kind : ""}`, { testid: "toast" }, text);
  place.append(note);
  setTimeout(() => note.remove(), kind === "bad" ? 8000 : 3500);
}

export function status(name) {
  return h(`span.status.${name}`, {}, name === "in_inspection" ? "open" : name);
}
