// The two charts, with Chart.js (vendor/), each with its legend and the same figures as a table.

import { compact, count, decimal, duration, flops, money, period, share } from "./format.js";

/** Chart.js is there; figures need not wait for it. */
export const ready = new Promise((resolve) => {
  if (globalThis.Chart) resolve();
  else document.getElementById("library").addEventListener("load", resolve);
});
const SERIES = 7;
const OTHERS = / others$/; // no name has a blank
const still = matchMedia("(prefers-reduced-motion: reduce)");
const colours = new Map(); // of the names in the chart of spend: each keeps its own while it is there

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Gives at most SERIES names colours, no two the same. */
function paint(names) {
  for (const name of colours.keys()) if (!names.includes(name)) colours.delete(name);
  const free = new Set(Array.from({ length: SERIES }, (_, i) => `--series-${i + 1}`));
  for (const taken of colours.values()) free.delete(taken);
  for (const name of names) {
    if (colours.has(name)) continue;
    const [first] = free;
    free.delete(first);
    colours.set(name, first);
  }
}

/** What bars may show: {value: name of the choice, label, of(Sum) as a Number, exact(Sum) as text, axis(Number)}. */
export function measures(currencies) {
  const spend = currencies.map((currency) => ({
    value: `money ${currency}`,
    label: currencies.length > 1 ? `money (${currency})` : "money",
    of: (sum) => Number(sum.moneyIn(currency)) / 1e9,
    exact: (sum) => money(sum.moneyIn(currency), currency),
    axis: (number) => axisMoney(number, currency),
  }));
  return [
    ...spend,
    { value: "computed", label: "samples computed", of: (sum) => sum.computed, exact: (sum) => count(sum.computed),
      axis: (number) => compact.format(number) },
    { value: "device", label: "device time",
      of: (sum) => Number(sum.device) / 1e9, exact: (sum) => duration(sum.device),
      axis: (number) => duration(BigInt(Math.round(number * 1e9))) },
    { value: "flops", label: "FLOPs", of: (sum) => sum.flops, exact: (sum) => flops(sum.flops), axis: flops },
  ];
}

const axes = new Map();

function axisMoney(number, currency) {
  if (!axes.has(currency)) {
    const style = { style: "currency", currency, notation: "compact", maximumSignificantDigits: 3 };
    axes.set(currency, new Intl.NumberFormat(undefined, style));
  }
  return axes.get(currency).format(number);
}

/** One stacked bar chart. */
class Bars {
  constructor(name) {
    this.name = name;
    this.canvas = document.getElementById(`${name}-chart`);
    this.details = document.getElementById(`${name}-details`);
    this.details.addEventListener("toggle", () => this.fillTable());
  }

  /** series: [{label, colour, sums, of, exact}], axis(Number), extra(i): a last line of a bar's tooltip. */
  show(usage, series, axis, extra = null) {
    Object.assign(this, { usage, series, axis, extra });
    const labels = usage.periods.map((name) => period(name, true));
    const datasets = series.map(({ label, colour, sums, of }) => ({
      label, data: sums.map(of), backgroundColor: css(colour), hoverBackgroundColor: css(colour),
      borderColor: css("--card"), hoverBorderColor: css("--card"), borderWidth: { top: 1 }, borderSkipped: false,
      borderRadius: 2, categoryPercentage: 0.86, barPercentage: 1,
    }));
    this.chart ??= new globalThis.Chart(this.canvas, { type: "bar", data: { labels, datasets }, options: {} });
    this.chart.data.labels = labels;
    // The same objects, so that a refresh moves nothing that has not changed.
    const old = new Map(this.chart.data.datasets.map((dataset) => [dataset.label, dataset]));
    this.chart.data.datasets = datasets.map((one) => Object.assign(old.get(one.label) ?? {}, one));
    this.chart.options = this.options();
    this.chart.update(still.matches ? "none" : undefined);
    this.legend();
    this.fillTable();
  }

  options() {
    const [soft, line] = [css("--soft"), css("--line")];
    const tick = { color: soft, font: { size: 11 } };
    return {
      maintainAspectRatio: false, responsive: true, locale: undefined, animation: { duration: still.matches ? 0 : 250 },
      interaction: { mode: "index", intersect: false },
      scales: {
        x: { stacked: true, grid: { display: false }, border: { color: line },
             ticks: { ...tick, maxRotation: 0, autoSkipPadding: 14 } },
        y: { stacked: true, beginAtZero: true, border: { display: false }, grid: { color: line },
             ticks: { ...tick, maxTicksLimit: 6, callback: (number) => this.axis(number) } },
      },
      plugins: {
        legend: { display: false },
        tooltip: {
          backgroundColor: css("--ink"),
          titleColor: css("--card"), bodyColor: css("--card"), footerColor: css("--card"),
          padding: 10, cornerRadius: 8, boxPadding: 4, filter: (item) => item.raw > 0,
          itemSort: (a, b) => b.datasetIndex - a.datasetIndex,
          callbacks: {
            title: ([item]) => (item ? this.title(item.dataIndex) : ""),
            label: (item) => {
              const one = this.series[item.datasetIndex];
              return `${one.label}: ${one.exact(one.sums[item.dataIndex])}`;
            },
            footer: ([item]) => (item && this.extra ? this.extra(item.dataIndex) : ""),
          },
        },
      },
    };
  }

  title(i) {
    return `${period(this.usage.periods[i])}${this.usage.by === "hour" ? " UTC" : ""}`;
  }

  legend() {
    document.getElementById(`${this.name}-legend`).replaceChildren(...this.series.map(({ label, colour }) => {
      const item = document.createElement("li");
      const key = document.createElement("span");
      key.className = "key";
      key.style.backgroundColor = css(colour);
      item.append(key, label);
      return item;
    }));
  }

  fillTable() {
    if (!this.details.open || !this.series) return;
    const table = document.getElementById(`${this.name}-table`);
    const last = this.extra ? [this.extraHead] : [];
    const first = this.usage.by === "hour" ? "Hour (UTC)" : "Day";
    const head = row("th", [first, ...this.series.map((one) => one.label), ...last]);
    for (const cell of head.children) cell.scope = "col";
    const lines = this.usage.periods.map((name, i) => {
      const cells = this.series.map((one) => one.exact(one.sums[i]));
      const line = row("td", [period(name), ...cells, ...(this.extra ? [this.extraCell(i)] : [])]);
      const when = document.createElement("th");
      when.scope = "row";
      when.textContent = line.firstChild.textContent;
      line.firstChild.replaceWith(when);
      return line;
    });
    const [thead, tbody] = [document.createElement("thead"), document.createElement("tbody")];
    thead.append(head);
    tbody.append(...lines.reverse());
    table.replaceChildren(thead, tbody);
  }
}

function row(tag, texts) {
  const line = document.createElement("tr");
  line.append(...texts.map((text) => {
    const cell = document.createElement(tag);
    cell.textContent = text;
    return cell;
  }));
  return line;
}

export class Charts {
  constructor() {
    this.spend = new Bars("spend");
    this.sources = new Bars("sources");
    this.sources.extraHead = "Hit rate";
  }

  /** measure: one of `measures`; tenant: "" for all, which are then stacked; else its jobs are. */
  show(usage, measure, tenant) {
    const others = (n) => `${n} others`;
    const name = tenant ? (line) => line.job : (line) => line.tenant;
    const groups = usage.stacked(name, measure.of, SERIES, others);
    paint([...groups.keys()].filter((label) => !OTHERS.test(label)).map((label) => `${tenant}/${label}`));
    this.spend.show(usage, [...groups].map(([label, sums]) => ({
      label, sums, colour: colours.get(`${tenant}/${label}`) ?? "--series-others", of: measure.of, exact: measure.exact,
    })), measure.axis);

    const sums = usage.overTime();
    const source = (label, colour, key) => ({
      label, colour, sums, of: (sum) => sum[key], exact: (sum) => count(sum[key]),
    });
    const rate = (i) => share(sums[i].hits, sums[i].answered);
    this.sources.extraCell = rate;
    this.sources.show(
      usage,
      [source("computed", "--computed", "computed"), source("cached", "--cache", "cached"),
       source("coalesced", "--coalesced", "coalesced")],
      (number) => (number < 1 ? decimal.format(number) : compact.format(number)),
      (i) => `hit rate ${rate(i)}`,
    );
    summarise("spend", usage, (i) => measure.of(sums[i]), measure.axis);
    summarise("sources", usage, (i) => sums[i].answered, count);
  }
}

/** For those who do not see the chart: its largest bar. */
function summarise(name, usage, size, text) {
  let most = 0;
  for (let i = 1; i < usage.periods.length; i += 1) if (size(i) > size(most)) most = i;
  const said = size(most) > 0
    ? `Bars by ${usage.by}; the largest is ${text(size(most))}, ${period(usage.periods[most])}.`
    : "Nothing in this range.";
  document.getElementById(`${name}-summary`).textContent = `${said} The same figures stand in the table below.`;
}
