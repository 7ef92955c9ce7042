
// Values to text, and text to elements. Text is only ever set as text, so nobody's id is markup.

const INTEGERS = new Intl.NumberFormat("en");

function count(value) {
  return value === null || value === undefined ? "–" : INTEGERS.format(value);
}

function seconds(ms) {
  if (ms === null || ms === undefined) return "–";
  const s = ms / 1000;
  if (Math.abs(s) < 10) return `${s.toFixed(2)} s`;
  if (Math.abs(s) < 120) return `${s.toFixed(1)} s`;
  return Math.abs(s) < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

function clockTime(epochMs) {
  return new Date(epochMs).toLocaleTimeString("en-GB");
}

function shortId(id) {
  return id.length > 9 ? `…${id.slice(-8)}` : id;
}

function words(code) {
  return code.replaceAll("_", " ").toLowerCase();
}

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// Touches the document only where something changes: setting equal text costs a layout too.
function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

function setClass(target, className) {
  if (target.className !== className) target.className = className;
}

function pairs(list, entries) {
  const made = entries.map(([name, value]) => {
    const group = element("div");
    group.append(element("dt", "", name), element("dd", "", value));
    return group;
  });
  list.replaceChildren(...made);
}
