// The address holds the view: forms and links marked data-view change it, and the page is brought in step with it,
// region by region, without being left.

const banner = document.getElementById("banner");
const SLIDE_MS = 140;
let turn = 0;
let lost = false;

function say(text) {
  banner.textContent = text;
  banner.hidden = !text;
}

function mark(isLost) {
  if (isLost) say("Connection lost · trying again");
  else if (lost) say("");
  lost = isLost;
}

function keepState(old, newer) {
  const open = [...old.querySelectorAll("details")].map((item) => item.open);
  newer.querySelectorAll("details").forEach((item, i) => { item.open = Boolean(open[i]); });
  const scrolled = [...old.querySelectorAll(".scroll")].map((item) => [item.scrollTop, item.scrollLeft]);
  const focus = old.contains(document.activeElement) ? document.activeElement : null;
  const path = focus && (focus.getAttribute("href") || focus.value);
  const texts = focus && focus.textContent;
  old.replaceChildren(...newer.childNodes);
  old.querySelectorAll(".scroll").forEach((item, i) => { if (scrolled[i]) [item.scrollTop, item.scrollLeft] = scrolled[i]; });
  if (!focus) return;
  const same = [...old.querySelectorAll(focus.tagName)].find((item) => (item.getAttribute("href") || item.value) === path || (texts && item.textContent === texts));
  if (same) same.focus({ preventScroll: true });
}

async function refresh() {
  const own = ++turn;
  const root = document.querySelector("[data-shape]");
  let answer;
  try {
    answer = await fetch(location.href.split("#")[0], { headers: { Accept: "text/html" } });
  } catch {
    return mark(true);
  }
  if (answer.status === 401) return say("The session has ended · open the address with the token again");
  if (answer.status >= 500) return mark(true);
  const text = await answer.text();
  // A later change of the view has been asked for meanwhile: its own answer counts.
  if (own !== turn) return;
  const fresh = new DOMParser().parseFromString(text, "text/html");
  if (!answer.ok) return say(fresh.querySelector("main p")?.textContent || "That cannot be shown");
  // Parts that were not there before (the first result of a study, the end of a trial) need the whole page.
  if (root && fresh.querySelector("[data-shape]")?.dataset.shape !== root.dataset.shape) return location.reload();
  for (const region of document.querySelectorAll("[data-live]")) {
    const newer = fresh.getElementById(region.id);
    if (newer && newer.innerHTML !== region.innerHTML) keepState(region, newer);
  }
  for (const box of document.querySelectorAll("[data-chart][data-source]")) {
    const newer = fresh.querySelector(`[data-chart="${box.dataset.chart}"]`);
    if (!newer) continue;
    box.dataset.source = newer.dataset.source;
    const words = box.closest("figure").querySelector("[data-words]");
    if (words) words.textContent = newer.getAttribute("aria-label");
    box.setAttribute("aria-label", newer.getAttribute("aria-label"));
  }
  document.dispatchEvent(new Event("charts:refresh"));
  if (!lost) say("");
  mark(false);
}

function go(query) {
  const address = new URL(location.href);
  address.search = query.toString();
  history.replaceState(null, "", address);
  refresh();
}

function queryOf(form) {
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) {
    // What is not said is as it would be anyway, so that addresses stay short.
    if (typeof value === "string" && value !== "" && !(name === "rung" && value === "0")) query.append(name, value);
  }
  return query;
}

function fill(form, query) {
  for (const field of [...form.elements]) {
    if (!field.name) continue;
    const values = query.getAll(field.name);
    if (field.type === "checkbox") field.checked = values.includes(field.value);
    else if (field.name === "pick") field.remove();
    else if (field.name === "down" && !values.length) field.remove();
    else if (field.type === "hidden") field.value = values[0] || "";
    else if (field.tagName === "SELECT" && values.length) field.value = values[0];
    else if (field.tagName === "SELECT" && !["x", "y", "third", "batch"].includes(field.name)) field.selectedIndex = 0;
  }
  const hide = (name, value) => {
    const field = Object.assign(document.createElement("input"), { type: "hidden", name, value });
    form.append(field);
  };
  for (const number of query.getAll("pick")) hide("pick", number);
  if (query.get("down") && !form.elements.down) hide("down", "1");
}

function differ(form, changed) {
  // Two axes of one picture never show the same objective.
  const [x, y] = [form.elements.x, form.elements.y];
  if (!x || !y || x.value !== y.value) return;
  const other = changed === x ? y : x;
  other.value = [...other.options].map((option) => option.value).find((value) => value !== changed.value);
}

const viewForm = () => document.querySelector("form[data-view]");

document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-view]");
  if (form && !event.target.dataset.for) {
    differ(form, event.target);
    // A lasso was drawn in the units of the axes that were there.
    if (["x", "y", "view"].includes(event.target.name) && form.elements.area) form.elements.area.value = "";
    if (["x", "y", "x_scale", "y_scale", "view"].includes(event.target.name)) location.hash && history.replaceState(null, "", location.pathname + location.search);
    if (form.reportValidity()) go(queryOf(form));
  }
  if (event.target.matches("[data-pick]")) pick(event.target);
});

let sliding = 0;
document.addEventListener("input", (event) => {
  const slider = event.target;
  if (!slider.dataset || !slider.dataset.for) return;
  const field = slider.form.elements[slider.dataset.for];
  field.value = slider.dataset.steps.split(" ")[Number(slider.value)];
  slider.setAttribute("aria-valuetext", `${Number(field.value).toLocaleString("en")} tokens`);
  clearTimeout(sliding);
  sliding = setTimeout(() => go(queryOf(slider.form)), SLIDE_MS);
});

function pick(box) {
  const query = new URLSearchParams(location.search);
  let numbers = query.getAll("pick").filter((number) => number !== box.value);
  if (box.checked) numbers = [...numbers, box.value];
  if (numbers.length > 6) {
    box.checked = false;
    return say("Six layouts at most are compared");
  }
  query.delete("pick");
  for (const number of numbers) query.append("pick", number);
  if (viewForm()) fill(viewForm(), query);
  go(query);
}

document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-view]")) return;
  event.preventDefault();
  go(queryOf(event.target));
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-view]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const query = new URL(link.href).searchParams;
  if (viewForm()) fill(viewForm(), query);
  go(query);
});

document.addEventListener("charts:lasso", (event) => {
  const { x, y } = event.detail;
  const step = Math.max(1, Math.ceil(x.length / 60));
  const corners = [];
  for (let i = 0; i < x.length; i += step) corners.push(`${Number(x[i].toPrecision(5))},${Number(y[i].toPrecision(5))}`);
  const query = new URLSearchParams(location.search);
  query.set("area", corners.join(";"));
  query.delete("page");
  if (viewForm()) fill(viewForm(), query);
  go(query);
});

document.addEventListener("view:refresh", refresh);
document.addEventListener("view:lost", (event) => mark(event.detail));
