// Draws the figures of the page, shows and hides their series, and sorts its tables.
const packed = Uint8Array.from(atob(document.getElementById("figures").textContent), (letter) => letter.charCodeAt(0));
const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const figures = await new Response(unpacked).json();
const darkness = matchMedia("(prefers-color-scheme: dark)");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLORS = 8;
// The marks of charts.SHAPES, in a box of 12 × 12.
const MARKS = [
  "M6 1a5 5 0 1 0 .01 0z", "M1.5 1.5h9v9h-9z", "M6 1l5 9.5h-10z", "M6 .5L11.5 6 6 11.5.5 6z",
  "M6 11l5-9.5h-10z", "M4 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z", "M11 6l-9.5 5v-10z", "M1 6l9.5 5v-10z",
];

function theme() {
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map(css);
  return {
    background: null,
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
            labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 240 },
    legend: { labelColor: soft, titleColor: soft, gradientStrokeColor: line },
    text: { color: ink, fontSize: 12 },
    range: { category: [...Array(COLORS).keys()].map((i) => css(`--c${i}`)) },
  };
}

const views = figures.map(() => []);
const shown = figures.map((figure) => new Set(figure.series));

async function draw(place) {
  const [number, index] = place.dataset.panel.split(" ").map(Number);
  const spec = { ...structuredClone(figures[number].panels[index]), width: "container", autosize: { type: "fit-x", contains: "padding" } };
  const param = (spec.params ?? []).find((each) => each.name === "shown");
  if (param && figures[number].series.length) param.value = [...shown[number]];
  views[number][index]?.finalize();
  const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, config: theme(), tooltip: { theme: darkness.matches ? "dark" : "light" } };
  try {
    views[number][index] = (await window.vegaEmbed(place, spec, options)).view;
  } catch (error) {
    place.textContent = `This figure could not be drawn: ${error.message}`;
  }
}

function legend(box, number) {
  const { series } = figures[number];
  const apply = () => {
    [...box.children].forEach((button, i) => button.setAttribute("aria-pressed", shown[number].has(series[i])));
    for (const view of views[number]) view?.signal("shown", [...shown[number]]).runAsync();
  };
  series.forEach((name, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Click: show or hide. Double click: this one alone, or all.";
    button.innerHTML = `<svg viewBox="0 0 12 12" aria-hidden="true"><path d="${MARKS[(i + Math.floor(i / COLORS)) % MARKS.length]}" fill="var(--c${i % COLORS})"/></svg>`;
    button.append(name);
    button.addEventListener("click", () => {
      if (!shown[number].delete(name)) shown[number].add(name);
      apply();
    });
    button.addEventListener("dblclick", () => {
      const alone = shown[number].size === 1 && shown[number].has(name);
      shown[number] = new Set(alone ? series : [name]);
      apply();
    });
    box.append(button);
  });
  apply();
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const numeric = (cell) => ("value" in cell.dataset ? Number(cell.dataset.value) : null);
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const isText = rows.every((row) => numeric(row.cells[column]) === null);
    rows.sort((one, other) => {
      const [a, b] = [one, other].map((row) => row.cells[column]);
      if (isText) return -sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
      const [x, y] = [numeric(a), numeric(b)];
      return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);  // what is not known comes last
    });
    table.tBodies[0].append(...rows);
  }));
}

document.querySelectorAll("table").forEach(sortable);
document.querySelectorAll("figure[data-figure]").forEach((each) => legend(each.querySelector(".legend"), Number(each.dataset.figure)));

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((each) => each.isIntersecting)) {
    links.forEach((link, id) => link.classList.toggle("here", id === entry.target.id));
  }
}, { rootMargin: "0px 0px -70% 0px" });
document.querySelectorAll("section[id]").forEach((section) => watch.observe(section));

const places = [...document.querySelectorAll(".plot")];
async function drawAll() {
  for (const place of places) await draw(place);
  document.documentElement.dataset.drawn = String(places.length);
}
darkness.addEventListener("change", drawAll);
await drawAll();
