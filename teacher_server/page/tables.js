// The tables. All text from the ledger goes in as text, never as markup. `data-exact` holds what a cell rounds.

import { about, count, duration, flops, moment, monies, money, places, share } from "./format.js";
import { outlook } from "./usage.js";

const LONG = 32;

const byId = (id) => document.getElementById(id);

function cell(text, exact, className) {
  const td = document.createElement("td");
  td.textContent = text;
  if (exact !== undefined) {
    td.dataset.exact = String(exact);
    if (String(exact) !== text) td.title = String(exact);
  }
  if (className) td.className = className;
  return td;
}

/** A long name is broken into lines; others are kept whole, and set the width of their column. */
function named(element, text) {
  element.textContent = text;
  element.classList.toggle("long", text.length > LONG);
  return element;
}

function rowHead(text, sub) {
  const th = named(document.createElement("th"), text);
  th.scope = "row";
  if (sub) {
    const small = document.createElement("span");
    small.className = "sub";
    small.textContent = sub;
    th.append(small);
  }
  return th;
}

function line(...cells) {
  const tr = document.createElement("tr");
  tr.append(...cells);
  return tr;
}

function exactMoney(sums) {
  return [...sums].map(([currency, nanos]) => `${nanos} ${currency}`).join(" + ");
}

const totalMoney = (sums) => [...sums.values()].reduce((all, nanos) => all + nanos, 0n);
const plain = (text) => (sum) => cell(count(sum[text]), sum[text]);

/** Of the jobs' table. [head, sort key(sum), cell(sum, decimals of money)] */
const COLUMNS = [
  ["Spend", (sum) => totalMoney(sum.money), (sum, digits) => cell(monies(sum.money, digits), exactMoney(sum.money))],
  ["Computed", (sum) => sum.computed, plain("computed")],
  ["Cached", (sum) => sum.cached, plain("cached")],
  ["Coalesced", (sum) => sum.coalesced, plain("coalesced")],
  ["Asked", (sum) => sum.asked, plain("asked")],
  ["Candidates", (sum) => sum.candidates, plain("candidates")],
  ["Hit rate", (sum) => (sum.answered ? sum.hits / sum.answered : -1), (sum) => cell(share(sum.hits, sum.answered))],
  ["Of full KD", (sum) => (sum.full ? sum.computed / sum.full : -1), (sum) => cell(share(sum.computed, sum.full))],
  ["Device time", (sum) => sum.device, (sum) => cell(duration(sum.device), `${sum.device} ns`)],
  ["Computation", (sum) => sum.flops, (sum) => cell(flops(sum.flops), `${sum.flops} FLOPs`)],
];

export class JobsTable {
  constructor() {
    this.sort = "Spend";
    this.falling = true;
    this.jobs = [];
    const heads = ["Tenant", "Job", ...COLUMNS.map(([head]) => head)];
    byId("jobs-heads").replaceChildren(...heads.map((head) => this.head(head)));
    byId("filter").addEventListener("input", () => this.fill());
    this.mark();
  }

  head(name) {
    const th = document.createElement("th");
    const button = document.createElement("button");
    th.scope = "col";
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => {
      this.falling = this.sort === name ? !this.falling : !["Tenant", "Job"].includes(name);
      this.sort = name;
      this.mark();
      this.fill();
    });
    th.append(button);
    return th;
  }

  mark() {
    for (const th of byId("jobs-heads").children) {
      if (th.textContent === this.sort) th.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
  }

  show(usage) {
    this.jobs = usage.jobs();
    this.total = usage.total();
    this.fill();
  }

  fill() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const some = this.jobs.filter(({ tenant, job }) => `${tenant} ${job}`.toLowerCase().includes(wanted));
    const column = COLUMNS.find(([head]) => head === this.sort);
    const key = column ? (one) => column[1](one.sum) : (one) => one[this.sort.toLowerCase()].toLowerCase();
    const name = (one) => `${one.tenant}\n${one.job}`;
    const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    some.sort((a, b) => (this.falling ? -1 : 1) * order(key(a), key(b)) || order(name(a), name(b)));
    const digits = Math.max(2, ...this.jobs.flatMap(({ sum }) => [...sum.money.values()].map(places)));
    byId("jobs-rows").replaceChildren(...some.map(({ tenant, job, sum }) => {
      const tr = line(rowHead(tenant), named(cell(""), job), ...COLUMNS.map(([, , made]) => made(sum, digits)));
      Object.assign(tr.dataset, { tenant, job });
      return tr;
    }));
    const all = some.length === this.jobs.length;
    const sum = line(rowHead("All"), cell(""), ...COLUMNS.map(([, , made]) => made(this.total, digits)));
    byId("jobs-sum").replaceChildren(...(all && this.jobs.length > 1 ? [sum] : []));
    const said = all ? `${count(this.jobs.length)} ${this.jobs.length === 1 ? "job" : "jobs"}`
      : `${count(some.length)} of ${count(this.jobs.length)} jobs`;
    if (byId("jobs-count").textContent !== said) byId("jobs-count").textContent = said;
  }
}

export function showSavings(total) {
  const money = [total.money, total.cacheMoney, total.selectionMoney, total.fullMoney];
  const digits = Math.max(2, ...money.flatMap((sums) => [...sums.values()].map(places)));
  const rows = [
    ["computed", "Computed", total.computed, total.money],
    ["cache", "Cache saved", total.hits, total.cacheMoney],
    ["selection", "Selection saved", total.unasked, total.selectionMoney],
    ["", "Full KD", total.full, total.fullMoney],
  ];
  byId("savings-rows").replaceChildren(...rows.map(([kind, name, samples, sums]) => {
    const head = rowHead(name);
    if (kind) {
      const key = document.createElement("span");
      key.className = `key ${kind}`;
      head.prepend(key);
    }
    return line(head, cell(count(samples), samples), cell(monies(sums, digits), exactMoney(sums)),
      cell(share(samples, total.full)));
  }));
  for (const [kind, , samples] of rows.slice(0, 3)) {
    byId("split").querySelector(`.${kind}`).style.flex = `${total.full ? samples / total.full : 0} 1 0`;
  }
  const saved = new Map([...total.fullMoney].map(([c, nanos]) => [c, nanos - (total.money.get(c) ?? 0n)]));
  const samples = total.full - total.computed;
  const amount = document.createElement("b");
  amount.textContent = totalMoney(saved) ? monies(saved) : `${count(samples)} samples`;
  const part = share(total.computed, total.full);
  byId("claim").replaceChildren(...(samples > 0
    ? [amount, ` saved: the teacher computed ${part} of what full KD would have had it compute.`]
    : ["Everything that the students saw was asked about and computed: nothing was saved yet."]));
}

const PER = { total: "in all", day: "a day", month: "a month" };

export function showBudgets(usage, currencies) {
  // A budget counts the nanos of every price alike: of several currencies it can be given no single one.
  const spend = (nanos) => (currencies.length > 1 ? `${money(nanos, "")} ${currencies.join("/")}`
    : money(nanos, currencies[0] ?? ""));
  const amount = (n, unit) => (unit === "money" ? spend(BigInt(n))
    : `${count(BigInt(n))} ${BigInt(n) === 1n ? "sample" : "samples"}`);
  byId("budget-rows").replaceChildren(...usage.budgets.map((budget) => {
    const { unit, limit, spent, left } = budget;
    const used = Number(limit) > 0 ? Math.min(1, Number(spent) / Number(limit)) : 1;
    const meter = document.createElement("div");
    const fill = document.createElement("span");
    meter.className = "meter";
    meter.setAttribute("aria-hidden", "true");
    fill.style.width = `${100 * used}%`;
    meter.append(fill);
    const bar = cell("");
    const said = document.createElement("span");
    said.className = "sub";
    const rest = said.cloneNode();
    const soFar = unit === "money" ? amount(spent, unit) : count(BigInt(spent));
    said.textContent = `${soFar} of ${amount(limit, unit)} ${PER[budget.period]}, ${share(used, 1)}`;
    rest.textContent = `${amount(left, unit)} left`;
    rest.className = "sub left";
    rest.dataset.exact = left;
    bar.append(meter, said, rest);
    const tr = line(rowHead(budget.tenant, budget.job || "all jobs"), bar, runsOut(budget, usage.now));
    Object.assign(tr.dataset, { tenant: budget.tenant, job: budget.job, unit, period: budget.period });
    const state = outlook(budget, usage.now);
    tr.className = state.state === "spent" ? "spent" : state.state === "ends" && state.wait < 864e5 ? "near" : "";
    return tr;
  }));
  byId("budgets").hidden = !usage.budgets.length;
  byId("no-budgets").hidden = usage.budgets.length > 0;
}

function runsOut(budget, now) {
  const found = outlook(budget, now);
  const until = found.until ? moment(found.until) : "";
  const [text, sub] = {
    spent: ["spent", until ? `begins anew ${until}` : "queries are refused"],
    idle: ["no spend of late", until ? `begins anew ${until}` : ""],
    lasts: ["lasts beyond its period", `begins anew ${until}`],
    ends: [`in ${about(found.wait ?? 0)}`, found.at && found.wait < 3.15e10 ? moment(found.at) : ""],
  }[found.state];
  const td = cell(text, undefined, "when");
  const small = document.createElement("span");
  small.className = "sub";
  small.textContent = sub;
  td.append(small);
  return td;
}

export function showBooks({ platform }) {
  const { forwarded, charged, wasted, own } = platform;
  const bold = (n) => {
    const b = document.createElement("b");
    b.textContent = count(BigInt(n));
    return b;
  };
  byId("equation").replaceChildren("forwarded ", bold(forwarded), " = charged ", bold(charged), " + wasted ",
    bold(wasted), " + own ", bold(own));
  const even = BigInt(forwarded) === BigInt(charged) + BigInt(wasted) + BigInt(own);
  const verdict = document.createElement("span");
  verdict.className = even ? "balanced" : "unbalanced";
  verdict.textContent = even ? "✓ The books balance" : "✗ The books do not balance";
  byId("balance").replaceChildren(verdict, even
    ? ", since the ledger began: every sample of a forward pass is somebody's, or the platform's own."
    : ": run teacher-server ledger verify.");
  byId("account-rows").replaceChildren(...platform.accounts.map(({ account, samples, device_nanoseconds: device }) =>
    line(rowHead(account), cell(count(samples), samples), cell(duration(BigInt(device)), `${device} ns`))));
  byId("accounts").hidden = !platform.accounts.length;
}

export function showTeachers(teachers) {
  byId("teacher-rows").replaceChildren(...teachers.map((teacher) => {
    const price = BigInt(teacher.nanos_per_sample);
    return line(rowHead(teacher.name, `${teacher.fingerprint}${teacher.served ? "" : " (not served here now)"}`),
      cell(price ? money(price, teacher.currency) : "nothing", `${price} ${teacher.currency}`),
      cell(flops(teacher.flops_per_sample), `${teacher.flops_per_sample} FLOPs`));
  }));
}
