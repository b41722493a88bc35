"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.toggle("dark", matchMedia("(prefers-color-scheme: dark)").matches);
  document.getElementById("theme").addEventListener("click", () => root.classList.toggle("dark"));

  // A click on a column's head sorts the table; the next click reverses the order. Rows without a value stay last.
  const compare = (kind, sign) => (a, b) => {
    if (kind === "text") return sign * a.localeCompare(b, undefined, { numeric: true });
    const [x, y] = [Number(a), Number(b)];
    return (x < 0) - (y < 0) || sign * (x - y);
  };
  for (const head of all("table.sortable th[data-sort]")) {
    head.tabIndex = 0;
    const sort = () => {
      const kind = head.dataset.sort;
      const before = head.getAttribute("aria-sort");
      const first = kind === "text" ? "ascending" : "descending";
      const order = before ? (before === "ascending" ? "descending" : "ascending") : first;
      all("th", head.parentElement).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const body = head.closest("table").tBodies[0];
      const order_of = compare(kind, order === "ascending" ? 1 : -1);
      const value = (row) => row.cells[head.cellIndex].dataset.value;
      body.append(...[...body.rows].sort((a, b) => order_of(value(a), value(b))));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  }

  for (const set of all("section.set")) {
    const find = (selector) => set.querySelector(selector);
    const category = find("select.category");
    const rank = find("select.rank");
    const search = find("input.search");
    const has = (element, chosen) => chosen === "all" || element.dataset.categories.split(" ").includes(chosen);
    const update = () => {
      const chosen = category ? category.value : "all";
      const lines = all("[data-group]", set);
      lines.forEach((line) => line.toggleAttribute("hidden", line.dataset.group !== chosen));
      const missing = find(".missing");
      if (missing) missing.hidden = lines.some((line) => line.dataset.group === chosen);
      all(".pictures figure", set).forEach((figure) => {
        const ranked = ["worst", "best"].includes(figure.dataset.rank);
        const wanted = !ranked || rank.value === "all" || rank.value === figure.dataset.rank;
        figure.hidden = !wanted || !has(figure, chosen);
      });
      const text = search ? search.value.toLowerCase() : "";
      const rows = all("table.images tbody tr", set);
      rows.forEach((row) => {
        row.hidden = !has(row, chosen) || !row.cells[0].dataset.value.toLowerCase().includes(text);
      });
      if (find(".shown")) find(".shown").textContent = rows.filter((row) => !row.hidden).length;
      all("table.categories tbody tr", set).forEach((row) => {
        row.classList.toggle("chosen", row.dataset.category === chosen);
      });
    };
    [category, rank, search].forEach((control) => control && control.addEventListener("input", update));
    all("table.categories tbody tr", set).forEach((row) => row.addEventListener("click", () => {
      category.value = category.value === row.dataset.category ? "all" : row.dataset.category;
      update();
    }));
    update();
  }

  const zoom = document.getElementById("zoom");
  all(".pictures img").forEach((image) => image.addEventListener("click", () => {
    zoom.firstElementChild.src = image.src;
    zoom.showModal();
  }));
  zoom.addEventListener("click", () => zoom.close());
})();
