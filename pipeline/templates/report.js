"use strict";
// Sorting, filters and pages of the long tables. Rows are made of text only; nothing is ever read as HTML.
{
  const PAGE = 50, PAPER = 200, CHOICES = 40;
  const KINDS = {
    _: ["span"], b: ["bdi"], k: ["bdi", "key"], s: ["small"], i: ["i"], w: ["div", "why"], d: ["details", "why"], m: ["span", "muted"],
    0: ["span", "tier"], 1: ["span", "tier same"], 2: ["span", "tier blend"], 3: ["span", "tier hub"],
  };
  const make = (name, style, text) => {
    const one = document.createElement(name);
    if (style) one.className = style;
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const many = (value) => value.toLocaleString("en-US");

  const start = (box) => {
    const { words, rows } = JSON.parse(box.querySelector("script").textContent);
    const heads = [...box.querySelectorAll("thead th")];
    const [body, form, said, pages] = ["tbody", "form", ".said", ".pages"].map((one) => box.querySelector(one));
    const word = (part) => (typeof part === "number" ? words[part] : part);
    const first = (row, column) => (row[2][column].length ? word(row[2][column][0]).slice(1) : "");
    const searched = form.dataset.text.split(" ").map(Number);
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    const texts = [];  // what the search looks at, by row; made when it is first asked for
    let shown = rows, order = rows, at = 0, by = -1, falls = false;

    const text = (row) => {
      const place = row[3];
      texts[place] ??= searched.map((one) => row[2][one].map((part) => word(part).slice(1)).join(" ")).join(" ").toLowerCase();
      return texts[place];
    };
    const line = (row) => {
      const one = make("tr", row[0] ? "" : "unlisted");
      row[2].forEach((cell, column) => {
        const head = heads[column], made = make("head" in head.dataset ? "th" : "td", head.classList.contains("n") ? "n" : "");
        if ("head" in head.dataset) made.scope = "row";
        made.dataset.label = head.dataset.label;
        for (const part of cell.map(word)) {
          const [name, style] = KINDS[part[0]];
          const piece = make(name, style, part.slice(1));
          if (name === "details") piece.prepend(make("summary", "", "reasons"));
          made.append(piece, " ");
        }
        one.append(made);
      });
      return one;
    };
    const draw = (from = at * PAGE, to = from + PAGE) => {
      body.replaceChildren(...shown.slice(from, to).map(line));
      const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1), all = many(rows.length);
      const range = shown.length ? `Rows ${many(from + 1)} to ${many(Math.min(to, shown.length))} of ${many(shown.length)}` : "No row";
      said.textContent = shown.length < rows.length ? `${range} that pass the filters, ${all} in all` : range;
      pages.hidden = !last;
      for (const button of pages.querySelectorAll("button")) {
        button.setAttribute("aria-disabled", (button.dataset.step < 0 ? at === 0 : at === last));
      }
      pages.querySelector("span").textContent = `Page ${many(at + 1)} of ${many(last + 1)}`;
    };
    const filter = () => {
      const { text: asked, pick, least, listed } = form.elements;
      const wanted = asked.value.trim().toLowerCase(), lowest = least && least.value !== "" ? Number(least.value) : null;
      shown = order.filter((row) =>
        (!wanted || text(row).includes(wanted)) &&
        (!pick || !pick.value || first(row, Number(form.dataset.pick)) === pick.value.slice(1)) &&
        (lowest === null || (row[1][form.dataset.least] !== null && row[1][form.dataset.least] >= lowest)) &&
        (!listed || !listed.checked || row[0]));
      at = 0;
      draw();
    };
    const sort = (column) => {
      falls = by === column ? !falls : "falls" in heads[column].dataset;
      by = column;
      const sign = falls ? -1 : 1, numbers = heads[column].classList.contains("n");
      const keys = rows.map((row) => (numbers ? row[1][column] : first(row, column)));
      const missing = (key) => key === null || key === "";
      order = [...rows].sort((a, b) => {
        const [one, two] = [keys[a[3]], keys[b[3]]];
        if (missing(one) || missing(two)) return missing(one) - missing(two);
        return sign * (numbers ? one - two : compare(one, two));
      });
      heads.forEach((head, place) => {
        if (place === column) head.setAttribute("aria-sort", falls ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      filter();
    };

    rows.forEach((row, place) => row.push(place));
    heads.forEach((head, column) => {
      const button = make("button", "", head.textContent);
      button.type = "button";
      button.addEventListener("click", () => sort(column));
      head.replaceChildren(button);
    });
    for (const [step, name] of [[-Infinity, "First"], [-1, "Previous"], [1, "Next"], [Infinity, "Last"]]) {
      const button = make("button", "", name);
      button.type = "button";
      button.dataset.step = step;
      button.addEventListener("click", () => {
        const last = Math.max(0, Math.ceil(shown.length / PAGE) - 1), to = Math.min(last, Math.max(0, at + step));
        if (to === at) return;
        at = to;
        draw();
        box.scrollIntoView();
      });
      pages.append(button);
      if (step === -1) pages.append(make("span"));
    }
    if (form.elements.pick) {
      const values = new Set(rows.map((row) => first(row, Number(form.dataset.pick))).filter(Boolean));
      for (const value of [...values].sort(compare).slice(0, CHOICES)) {
        const option = make("option", "", value);
        option.value = `=${value}`;
        form.elements.pick.append(option);
      }
    }
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("beforeprint", () => draw(0, PAPER));
    addEventListener("afterprint", () => draw());
    form.hidden = said.hidden = false;
    draw();
  };
  document.querySelectorAll(".long").forEach(start);
}
