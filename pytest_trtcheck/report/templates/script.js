"use strict";
const table = document.getElementById("checks");
const checks = [...table.querySelectorAll(":scope > .check")];
// Rows of one model under its heading; a model of a single check has none.
const groups = [];
for (const body of table.tBodies) {
  if (body.matches(".group")) groups.push({ heading: body, checks: [] });
  else if (body.matches(".member")) groups.at(-1).checks.push(body);
  else groups.push({ heading: null, checks: [body] });
}
const search = document.getElementById("search");
const selects = [["precision", 2], ["evidence", 3]]
  .map(([id, column]) => [document.getElementById(id), column]).filter(([select]) => select);
const chips = [...document.querySelectorAll(".chip")];
const MANY = 40;

function said(check, column) {
  return check.rows[0].cells[column].textContent.trim();
}

// --- what is shown

function folded({ heading }) {
  return heading !== null && heading.querySelector(".fold").getAttribute("aria-expanded") === "false";
}

function fold(group, wanted) {
  group.heading?.querySelector(".fold").setAttribute("aria-expanded", String(!wanted));
}

function filter() {
  const words = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.word);
  const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = words.length > 0 || terms.length > 0 || selects.some(([select]) => select.value);
  let shown = 0;
  for (const group of groups) {
    const name = group.heading ? group.heading.querySelector(".fold").textContent : "";
    let fitting = 0;
    for (const check of group.checks) {
      const text = `${name} ${check.rows[0].textContent}`.toLowerCase();
      const fits = (!words.length || words.includes(said(check, 0)))
        && selects.every(([select, column]) => !select.value || said(check, column) === select.value)
        && terms.every((term) => text.includes(term));
      // What is looked for is shown, in whatever is folded.
      check.classList.toggle("folded", fits && !chosen && folded(group));
      check.hidden = !fits || (!chosen && folded(group));
      fitting += fits;
    }
    if (group.heading) group.heading.hidden = !fitting;
    shown += fitting;
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
  for (const group of groups) group.checks.sort(compare);
  groups.sort((one, other) => compare(one.checks[0], other.checks[0]));
  table.append(...groups.flatMap(({ heading, checks }) => (heading ? [heading, ...checks] : checks)));
}

// --- what is open, and the address of the page

function opened() {
  return checks.filter((check) => check.classList.contains("opened")).map((check) => check.id);
}

function open(check, wanted) {
  check.classList.toggle("opened", wanted);
  check.querySelector(".open").setAttribute("aria-expanded", String(wanted));
}

function toggle(check) {
  const wanted = !check.classList.contains("opened");
  open(check, wanted);
  const ids = opened();
  const current = decodeURIComponent(location.hash.slice(1));
  const shown = wanted ? check.id : ids.includes(current) ? current : ids.at(-1);
  // The page stays where it is: only its address changes, and going back undoes it.
  remember("pushState", shown ? `#${shown}` : location.pathname + location.search);
}

function remember(how, address) {
  try {
    history[how]({ opened: opened() }, "", address);
  } catch {
    // A page inside of another one may have no address of its own.
  }
}

function show(check) {
  const group = groups.find((each) => each.checks.includes(check));
  if (check.hidden) {
    search.value = "";
    for (const [select] of selects) select.value = "";
    for (const chip of chips) chip.setAttribute("aria-pressed", "false");
    fold(group, false);
    filter();
  }
  open(check, true);
  check.scrollIntoView();
  // Following an address, the browser takes the focus away afterwards.
  setTimeout(() => check.querySelector(".open").focus({ preventScroll: true }));
}

function follow() {
  const linked = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (checks.includes(linked)) show(linked);
  remember("replaceState");
}

window.addEventListener("popstate", (event) => {
  // Of an address that was typed or linked there is no state: it opens its check, and closes none.
  if (event.state?.opened) for (const check of checks) open(check, event.state.opened.includes(check.id));
  else follow();
});

// What scrolls sideways can be reached, and so scrolled, by the keyboard.
const scrolling = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const wide of document.querySelectorAll(".wide")) scrolling.observe(wide);

// --- copying

async function copied(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No such interface (a page by plain http), or it is not allowed here: the older way.
    const field = Object.assign(document.createElement("textarea"), { value: text, className: "hidden" });
    button.after(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    button.focus();
    return done;
  }
}

async function copy(button) {
  const source = button.parentElement.querySelector("pre, code");
  const done = await copied(source.textContent.trimEnd(), button);
  if (!done) getSelection().selectAllChildren(source);
  button.textContent = done ? "copied" : "press Ctrl+C";
  document.getElementById("copied").textContent = button.textContent;
  setTimeout(() => { button.textContent = "copy"; }, 2000);
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
    if (!String(getSelection())) toggle(check);
  });
}
for (const group of groups.filter(({ heading }) => heading)) {
  if (checks.length > MANY) fold(group, !group.checks.some((check) => check.matches(".bad")));
  group.heading.addEventListener("click", () => {
    if (!String(getSelection())) { fold(group, !folded(group)); filter(); }
  });
}
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
filter();
follow();
