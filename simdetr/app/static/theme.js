// Light or dark, before the first paint: what the person chose here, else what their system says.
(() => {
  const chosen = localStorage.getItem("simdetr.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
