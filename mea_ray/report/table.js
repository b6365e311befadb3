/* The table of a large report: sorted by a click on a heading, filtered by words and comparisons. No library, no network. */
"use strict";
(() => {
  const box = document.getElementById("rungs");
  const columns = JSON.parse(document.getElementById("rungs-data").textContent).columns;
  const count = columns[0].values.length;
  const head = box.querySelector("thead tr");
  const body = box.querySelector("tbody");
  const filter = document.getElementById("rungs-filter");
  const note = document.getElementById("rungs-note");
  const pager = document.getElementById("rungs-pages");
  const SIZE = 50;
  const TONES = { proved: "good", suggestive: "mixed", "not committed": "mixed" };
  let order = Array.from({ length: count }, (_, row) => row);
  let sorted = { column: null, down: true };
  let page = 0;

  const raw = (column, row) => {
    const value = column.values[row];
    return column.kind === "text" ? column.texts[value] : value;
  };
  const shown = (column, row) => {
    const value = raw(column, row);
    if (value === null || value === "") return "–";
    if (column.kind === "percent") return (100 * value).toFixed(1) + "%";
    if (column.kind === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(value);
    return value;
  };
  const named = new Map();
  columns.forEach((column) => { named.set(column.name, column); named.set(column.label.toLowerCase(), column); });

  /* "wsr>0.5 verdict=proved resnet" : all of them must hold. A rate may be written 0.5 or 50%. */
  const conditions = (text) => (text.match(/(?:[^\s"]+|"[^"]*")+/g) || []).map((word) => {
    const plain = word.replace(/"/g, "").toLowerCase();
    const parts = /^([\w.]+)(<=|>=|=|<|>)(.*)$/.exec(plain);
    const column = parts && named.get(parts[1]);
    if (!column) return (row) => columns.some((each) => each.kind === "text" && raw(each, row).toLowerCase().includes(plain));
    const [, , operator, wanted] = parts;
    if (column.kind === "text") return (row) => raw(column, row).toLowerCase() === wanted === (operator === "=");
    const number = wanted.endsWith("%") ? parseFloat(wanted) / 100 : parseFloat(wanted);
    return (row) => {
      const value = column.values[row];
      if (value === null) return false;
      return { "<": value < number, ">": value > number, "=": value === number, "<=": value <= number, ">=": value >= number }[operator];
    };
  });

  const compare = (column, down) => (a, b) => {
    const [left, right] = [raw(column, a), raw(column, b)];
    const gone = (value) => value === null || value === "";
    if (gone(left) || gone(right)) return gone(left) - gone(right) || a - b;
    const step = left < right ? -1 : left > right ? 1 : 0;
    return (down ? -step : step) || a - b;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(order.length / SIZE));
    page = Math.min(page, pages - 1);
    body.replaceChildren(...order.slice(page * SIZE, (page + 1) * SIZE).map((row) => {
      const line = document.createElement("tr");
      columns.forEach((column) => {
        const cell = document.createElement("td");
        cell.textContent = shown(column, row);
        cell.dataset.label = column.label;
        if (column.kind === "text") cell.className = "text";
        if (column.name === "verdict") cell.className = "text " + (TONES[raw(column, row)] || "bad");
        line.append(cell);
      });
      return line;
    }));
    note.textContent = `${order.length.toLocaleString("en")} of ${count.toLocaleString("en")} lines`;
    pager.querySelector("span").textContent = `page ${page + 1} of ${pages}`;
    pager.querySelector(".back").disabled = page === 0;
    pager.querySelector(".on").disabled = page === pages - 1;
  };

  const arrange = () => {
    const wanted = conditions(filter.value);
    order = [];
    for (let row = 0; row < count; row++) if (wanted.every((holds) => holds(row))) order.push(row);
    if (sorted.column) order.sort(compare(sorted.column, sorted.down));
    page = 0;
    draw();
  };

  columns.forEach((column) => {
    const heading = document.createElement("th");
    heading.scope = "col";
    if (column.kind === "text") heading.className = "text";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.label;
    button.addEventListener("click", () => {
      sorted = { column, down: sorted.column === column ? !sorted.down : column.kind !== "text" };
      head.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      arrange();
    });
    heading.append(button);
    head.append(heading);
  });
  filter.addEventListener("input", arrange);
  pager.querySelector(".back").addEventListener("click", () => { page -= 1; draw(); });
  pager.querySelector(".on").addEventListener("click", () => { page += 1; draw(); });
  box.hidden = false;
  arrange();
})();
