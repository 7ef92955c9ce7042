
// Light, dark, or as the system says; and the colours of the style sheet for canvases.

const THEMES = ["auto", "light", "dark"];
const COLOURS = ["text", "soft", "line", "grid", "accent", "waiting", "compute", "handoff", "decode", "lost"];
let palette = {};

function kept(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return ""; // storage may be forbidden
  }
}

function keep(name, value) {
  try {
    if (value) sessionStorage.setItem(name, value);
    else sessionStorage.removeItem(name);
  } catch {
    // Then it is forgotten with the page.
  }
}

function readPalette() {
  const probe = element("span");
  document.body.append(probe);
  const found = {};
  for (const name of COLOURS) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  palette = found;
}

function setTheme(name) {
  const theme = THEMES.includes(name) ? name : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(document.getElementById("theme"), `Theme: ${theme}`);
  keep("theme", theme === "auto" ? "" : theme);
  readPalette();
  return theme;
}
