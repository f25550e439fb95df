"use strict";
const table = document.getElementById("checks");
const checks = [...table.tBodies];
const search = document.getElementById("search");
const selects = [["precision", 2], ["evidence", 3]]
  .map(([id, column]) => [document.getElementById(id), column]).filter(([select]) => select);
const chips = [...document.querySelectorAll(".chip")];

function said(check, column) {
  return check.rows[0].cells[column].textContent.trim();
}

function filter() {
  const words = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.word);
  const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const check of checks) {
    const fits = (!words.length || words.includes(said(check, 0)))
      && selects.every(([select, column]) => !select.value || said(check, column) === select.value)
      && terms.every((term) => check.rows[0].textContent.toLowerCase().includes(term));
    check.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent = shown === checks.length ? "" : `${shown} of ${checks.length} shown`;
  document.getElementById("none").hidden = shown > 0 || !checks.length;
}

const collator = new Intl.Collator("en", { numeric: true });

function sort(header) {
  const column = header.cellIndex;
  const descending = header.getAttribute("aria-sort") === "ascending";
  const sign = descending ? -1 : 1;
  const value = (check) => check.rows[0].cells[column].dataset.sort ?? said(check, column);
  const compare = (one, other) => {
    const [a, b] = [value(one), value(other)];
    // What has no value comes last either way: it is never what was looked for.
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [a, b].map((text) => (text === "inf" ? Infinity : Number(text)));
    if (Number.isNaN(x) || Number.isNaN(y)) return sign * collator.compare(a, b);
    return x === y ? 0 : sign * (x < y ? -1 : 1);
  };
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  checks.sort(compare);
  table.append(...checks);
}

function open(check, wanted) {
  check.classList.toggle("opened", wanted);
  check.querySelector(".open").setAttribute("aria-expanded", String(check.classList.contains("opened")));
}

function openLinked() {
  const linked = checks.find((check) => `#${check.id}` === location.hash);
  if (linked) { open(linked, true); linked.scrollIntoView(); }
}

search.addEventListener("input", filter);
search.form.addEventListener("submit", (event) => event.preventDefault());
for (const [select] of selects) select.addEventListener("change", filter);
for (const chip of chips) {
  chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    filter();
  });
}
table.tHead.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) sort(button.parentElement);
});
for (const check of checks) {
  check.rows[0].addEventListener("click", () => {
    // Selecting text to copy it is no wish to open or close.
    if (!String(getSelection())) open(check);
  });
}
window.addEventListener("hashchange", openLinked);
filter();
openLinked();
