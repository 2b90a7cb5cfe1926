"use strict";
// Sorting and filtering of the tables marked with data-sortable. The page is complete without it.
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

function valueOf(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.value;
  return number === undefined ? cell.textContent : number === "" ? null : Number(number);
}

function compare(a, b) {
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  rows.sort((first, second) => {
    const a = valueOf(first, column);
    const b = valueOf(second, column);
    if (a === null || b === null) return compare(a, b); // what is missing stays last, whichever way it goes
    return descending ? compare(b, a) : compare(a, b);
  });
  body.append(...rows);
  for (const [index, head] of Array.from(table.tHead.rows[0].cells).entries()) {
    if (index === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

function makeSortable(table) {
  for (const [column, head] of Array.from(table.tHead.rows[0].cells).entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sortBy(table, column, head.getAttribute("aria-sort") === "ascending"));
    head.replaceChildren(button);
  }
}

function makeFilter(table) {
  const controls = document.getElementById(`${table.id}-controls`);
  if (!controls) return;
  const text = controls.querySelector("input");
  const band = controls.querySelector("select");
  const count = controls.querySelector("output");
  const rows = Array.from(table.tBodies[0].rows);
  const apply = () => {
    const wanted = text.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = row.textContent.toLowerCase().includes(wanted) && (!band.value || row.dataset.band === band.value);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    count.textContent = `${shown} of ${rows.length} facts`;
  };
  text.addEventListener("input", apply);
  band.addEventListener("change", apply);
  controls.hidden = false;
  apply();
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  makeSortable(table);
  makeFilter(table);
}
