// Sorts a table by a click on a heading, and copies a notation by a click on its button.

function key(cell) {
  return cell.dataset.sort === undefined ? cell.textContent.trim() : Number(cell.dataset.sort);
}

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  // What has no number stands after what has one.
  if (typeof one !== typeof other) return typeof one === "number" ? -1 : 1;
  return one.localeCompare(other, undefined, { numeric: true });
}

function sort(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => (ascending ? 1 : -1) * compare(key(a.cells[column]), key(b.cells[column])));
  table.tBodies[0].append(...rows);
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

async function copy(button) {
  const text = button.dataset.copy;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without the clipboard's permission (a file opened from disk), the text is selected for Ctrl-C instead.
    const source = button.parentElement.querySelector("code");
    if (source) getSelection().selectAllChildren(source);
    return;
  }
  button.dataset.done = "";
  button.textContent = "copied";
  setTimeout(() => { delete button.dataset.done; button.textContent = "copy"; }, 1500);
}

document.addEventListener("click", (event) => {
  const heading = event.target.closest("table.sortable th");
  if (heading) sort(heading);
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});

function dress() {
  for (const heading of document.querySelectorAll("table.sortable th")) {
    if (heading.querySelector("button")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
  }
}
dress();
document.addEventListener("charts:refresh", dress);
