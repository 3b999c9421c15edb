// A click on a column's name sorts its table; a second click reverses the order.
function valueOf(row, column) {
  const text = row.cells[column] ? row.cells[column].textContent.trim() : "";
  const number = text.replace("−", "-").replace(/^[×±] */, "").replace(/(\d) (\d{3})/g, "$1$2");
  return number && !Number.isNaN(Number(number)) ? Number(number) : text.toLowerCase();
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // numbers before names
  return a.localeCompare(b);
}

for (const table of document.querySelectorAll("article table")) {
  const names = table.tHead ? [...table.tHead.rows[0].cells] : [];
  if (!table.tBodies.length || table.tBodies[0].rows.length < 3) continue;
  names.forEach((cell, column) => {
    cell.classList.add("sortable");
    cell.addEventListener("click", () => {
      const order = cell.dataset.order === "1" ? -1 : 1;
      names.forEach((x) => delete x.dataset.order);
      cell.dataset.order = order;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => order * compare(valueOf(a, column), valueOf(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}
