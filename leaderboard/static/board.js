"use strict";
// Adds to complete pages: sorting, filters, a comparison of chosen rows, and their state in the address.
(() => {
  const FILTERS = [["model", "Model"], ["method", "Method"], ["bits", "Bits"], ["execution", "Execution"], ["level", "Level"]];
  const tables = [...document.querySelectorAll("table.board")];
  if (!tables.length) return;
  const state = { sort: {}, filter: {}, pick: new Set(), only: false };
  const pairs = (table) => [...table.tBodies[table.tBodies.length - 1].rows];
  const original = new Map(tables.map((table) => [table, pairs(table)]));
  const make = (tag, text, attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // The first number of a cell: a value, or a change where a view shows changes.
  const number = (cell) => {
    const found = cell && cell.textContent.replaceAll(",", "").match(/[−-]?\d+(\.\d+)?/);
    return found ? Number(found[0].replace("−", "-")) : NaN;
  };

  const sortRows = (table) => {
    const body = table.tBodies[table.tBodies.length - 1];
    const chosen = state.sort[table.id];
    const heads = [...table.querySelectorAll("thead th[data-column]")];
    for (const head of heads) {
      const on = chosen && head.dataset.column === chosen.column;
      head.setAttribute("aria-sort", on ? (chosen.down ? "descending" : "ascending") : "none");
    }
    let rows = [...original.get(table)];
    if (chosen) {
      const at = Number(chosen.column);
      const text = heads.find((head) => head.dataset.column === chosen.column)?.dataset.kind === "text";
      const key = (row) => (text ? row.cells[at].textContent.trim() : number(row.cells[at]));
      const keyed = rows.map((row) => [key(row), row]);
      keyed.sort(([a], [b]) => {
        if (text) return (chosen.down ? -1 : 1) * (a < b ? -1 : a > b ? 1 : 0);
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return chosen.down ? b - a : a - b;
      });
      rows = keyed.map(([, row]) => row);
    }
    body.append(...rows);
  };

  const shown = (row) => {
    const fits = Object.entries(state.filter).every(([name, value]) => !value || row.dataset[name] === value);
    return fits && (!state.only || state.pick.has(row.dataset.name) || row.classList.contains("twin"));
  };

  const apply = () => {
    for (const table of tables) {
      sortRows(table);
      let left = 0;
      for (const body of table.tBodies) {
        for (const row of body.rows) {
          const model = state.filter.model;
          row.hidden = row.classList.contains("twin") ? Boolean(model) && row.dataset.model !== model : !shown(row);
          row.classList.toggle("picked", state.pick.has(row.dataset.name));
          const box = row.querySelector("input[type=checkbox]");
          if (box) box.checked = state.pick.has(row.dataset.name);
          if (!row.hidden && !row.classList.contains("twin")) left += 1;
        }
      }
      const told = table.parentElement.previousElementSibling;
      if (told && told.matches(".told")) told.textContent = `${left} of ${original.get(table).length} rows`;
    }
    for (const select of document.querySelectorAll(".controls select")) select.value = state.filter[select.name] || "";
    const compare = document.querySelector(".controls .compare");
    compare.textContent = state.only ? "Show all rows" : `Compare ${state.pick.size} chosen`;
    compare.disabled = !state.only && state.pick.size === 0;
    compare.setAttribute("aria-pressed", String(state.only));
    for (const link of document.querySelectorAll("a.view")) link.hash = address(false);
  };

  const address = (own) => {
    const said = new URLSearchParams();
    for (const [name, value] of Object.entries(state.filter)) if (value) said.set(name, value);
    if (own) for (const [id, { column, down }] of Object.entries(state.sort)) said.append("sort", `${id}:${column}:${down ? "down" : "up"}`);
    if (state.pick.size) said.set("rows", [...state.pick].sort().join(","));
    if (state.only) said.set("only", "1");
    return said.toString();
  };

  const remember = () => {
    const hash = address(true);
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    apply();
  };

  // What an address may say is what the page offers; anything else is ignored.
  const recall = () => {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return apply();
    const said = new URLSearchParams(hash);
    const names = new Set(tables.flatMap((table) => original.get(table).map((row) => row.dataset.name)));
    state.filter = {};
    for (const select of document.querySelectorAll(".controls select")) {
      const value = said.get(select.name);
      if ([...select.options].some((option) => option.value === value)) state.filter[select.name] = value;
    }
    state.sort = {};
    for (const part of said.getAll("sort")) {
      const [id, column, way] = part.split(":");
      const table = tables.find((candidate) => candidate.id === id);
      if (table && table.querySelector(`thead th[data-column="${Number(column)}"]`)) state.sort[id] = { column: String(Number(column)), down: way === "down" };
    }
    state.pick = new Set((said.get("rows") || "").split(",").filter((name) => names.has(name)));
    state.only = said.get("only") === "1" && state.pick.size > 0;
    apply();
  };

  for (const table of tables) {
    for (const head of table.querySelectorAll("thead th[data-column]")) {
      const button = make("button", "", { type: "button", class: "sort" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = state.sort[table.id];
        const first = head.dataset.better === "higher";
        if (!now || now.column !== head.dataset.column) state.sort[table.id] = { column: head.dataset.column, down: first };
        else if (now.down === first) now.down = !first;
        else delete state.sort[table.id];
        remember();
      });
    }
    for (const row of original.get(table)) {
      const box = make("input", "", { type: "checkbox", "aria-label": `Choose ${row.dataset.name} for the comparison` });
      box.addEventListener("change", () => {
        if (box.checked) state.pick.add(row.dataset.name);
        else state.pick.delete(row.dataset.name);
        if (!state.pick.size) state.only = false;
        remember();
      });
      row.cells[0].prepend(box);
    }
    table.parentElement.before(make("p", "", { class: "told", "aria-live": "polite" }));
  }

  const controls = make("form", "", { class: "controls", "aria-label": "Choose rows" });
  controls.addEventListener("submit", (event) => event.preventDefault());
  const rows = tables.flatMap((table) => original.get(table));
  for (const [name, title] of FILTERS) {
    const values = [...new Set(rows.map((row) => row.dataset[name]).filter(Boolean))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    const label = make("label", title);
    const select = make("select", "", { name });
    select.append(make("option", "all", { value: "" }), ...values.map((value) => make("option", value, { value })));
    select.addEventListener("change", () => {
      state.filter[name] = select.value;
      remember();
    });
    label.append(select);
    controls.append(label);
  }
  const compare = make("button", "", { type: "button", class: "compare" });
  compare.addEventListener("click", () => {
    state.only = !state.only;
    remember();
  });
  const reset = make("button", "Reset", { type: "button" });
  reset.addEventListener("click", () => {
    Object.assign(state, { sort: {}, filter: {}, pick: new Set(), only: false });
    remember();
  });
  controls.append(compare, reset);
  (document.querySelector(".controls-here") || document.querySelector("main")).prepend(controls);
  addEventListener("hashchange", recall);
  recall();
})();
