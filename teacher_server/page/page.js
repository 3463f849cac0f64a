// Asks the server every few seconds, while somebody looks, and shows what it says.

import { Charts, measures, ready } from "./charts.js";
import { count, duration, flops, money, monies, share, timeOfDay } from "./format.js";
import { JobsTable, showBooks, showBudgets, showSavings, showTeachers } from "./tables.js";
import { Usage } from "./usage.js";

const REFRESH_MS = 5_000;
const PATIENCE_MS = 15_000;
const TOKEN = "preceptor-token";
const byId = (id) => document.getElementById(id);

const page = { charts: new Charts(), jobs: new JobsTable(), usage: null, range: "", updated: null, timer: 0, asking: null };

// ------------------------------------------------------------ asking

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function ask(path, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const reply = await fetch(path, { headers, signal, cache: "no-store", credentials: "omit", redirect: "error" });
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => ({}));
  throw new Refused(reply.status, said.detail ?? `the server answers ${reply.status}`);
}

function range() {
  return document.querySelector("input[name=range]:checked").value;
}

/** Whether the figures are now those of the range that was chosen when it began. */
async function refresh() {
  clearTimeout(page.timer);
  page.asking?.abort();
  const mine = (page.asking = new AbortController());
  const patience = setTimeout(() => mine.abort("late"), PATIENCE_MS);
  const wanted = range();
  let came = false;
  try {
    const reply = await ask(`/v1/usage?${wanted}`, mine.signal);
    const usage = new Usage(await reply.json());
    if (page.asking !== mine) return false;
    page.usage = usage;
    page.range = wanted;
    page.updated = new Date();
    signedIn();
    show();
    tell("live", `Live · updated ${timeOfDay(page.updated)}`);
    came = true;
  } catch (error) {
    if (page.asking !== mine) return false;
    if (error instanceof Refused && [401, 403].includes(error.status)) {
      signIn(error);
      return false;
    }
    lost(error);
  } finally {
    clearTimeout(patience);
    if (page.asking === mine) page.asking = null;
  }
  schedule();
  return came;
}

function schedule() {
  clearTimeout(page.timer);
  if (!document.hidden && byId("sign-in").hidden) page.timer = setTimeout(refresh, REFRESH_MS);
}

// ------------------------------------------------------------ saying how it stands

function tell(state, text) {
  byId("state").className = `is-${state}`;
  byId("state-text").textContent = text;
  if (state === "live" && !byId("trouble").hidden) {
    byId("trouble").hidden = true;
    say("The server can be reached again.");
  }
}

/** "24 hours" */
function nameOf(value) {
  return document.querySelector(`input[name=range][value="${value}"]`).parentElement.textContent.trim();
}

function lost(error) {
  const why = error instanceof Refused ? `The server says: ${error.message}.` : "The server cannot be reached.";
  const others = () => (page.range === range() ? "" : `, and still those of ${nameOf(page.range)}`);
  const since = page.updated ? ` The figures are of ${timeOfDay(page.updated)}${others()}.` : "";
  tell("lost", "Not live");
  const text = `${why}${since} Trying again every ${REFRESH_MS / 1000} seconds.`;
  if (byId("trouble").textContent !== text) byId("trouble").textContent = text;
  byId("trouble").hidden = false;
}

/** To those who listen. */
function say(text) {
  byId("said").textContent = text;
}

// ------------------------------------------------------------ signing in

function signIn(error) {
  const tried = sessionStorage.getItem(TOKEN);
  sessionStorage.removeItem(TOKEN);
  byId("figures").hidden = true;
  byId("trouble").hidden = true;
  byId("sign-out").hidden = true;
  byId("sign-in").hidden = false;
  tell("out", "Signed out");
  byId("refused").textContent = !tried ? "" : error.status === 403
    ? `This token may not see where the compute went: ${error.message}.`
    : `${error.message.replace(/^authorization: t/, "T")}.`;
  byId("token").focus();
}

function signedIn() {
  const token = sessionStorage.getItem(TOKEN);
  byId("sign-out").hidden = !token;
  if (byId("figures").hidden) {
    const came = !byId("sign-in").hidden;
    byId("sign-in").hidden = true;
    byId("figures").hidden = false;
    byId("token").value = "";
    byId("refused").textContent = "";
    if (came) byId("main").focus();
  }
}

function signOut() {
  sessionStorage.removeItem(TOKEN);
  page.usage = null;
  clearTimeout(page.timer);
  page.asking?.abort();
  page.asking = null;
  signIn(new Refused(401, ""));
}

// ------------------------------------------------------------ showing

function show() {
  const everything = page.usage;
  options(byId("tenant"), [["", "All tenants"], ...everything.tenants.map((name) => [name, name])]);
  const tenant = byId("tenant").value;
  const usage = everything.of(tenant);
  const total = usage.total();
  const all = new Set([...everything.currencies, ...everything.teachers.map((teacher) => teacher.currency)]);
  const currencies = everything.currencies.length ? everything.currencies : [...all];
  const empty = total.asked === 0 && total.computed === 0;
  byId("empty").hidden = !empty;
  byId("filled").hidden = empty;
  if (empty) firstLines();
  else {
    showTotals(usage, total);
    showSavings(total);
    page.jobs.show(usage);
    const choices = measures(currencies);
    options(byId("measure"), choices.map(({ value, label }) => [value, label]));
    byId("spend-title").textContent = `Spend over time, by ${tenant ? "job" : "tenant"}`;
    byId("hit-rate").textContent = share(total.hits, total.answered);
    const measure = choices.find(({ value }) => value === byId("measure").value) ?? choices[0];
    ready.then(() => page.charts.show(usage, measure, tenant));
  }
  showBudgets(usage, [...all].sort());
  showBooks(everything);
  showTeachers(everything.teachers);
  ready.then(() => {
    // Once they are painted; benchmarks/page.py reads it.
    if (!document.body.dataset.shown) {
      requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("shown")));
    }
    document.body.dataset.shown = everything.now.toISOString();
  });
}

function options(select, pairs) {
  const chosen = select.value;
  if (JSON.stringify([...select.options].map((o) => o.value)) !== JSON.stringify(pairs.map(([value]) => value))) {
    select.replaceChildren(...pairs.map(([value, label]) => new Option(label, value)));
    select.value = pairs.some(([value]) => value === chosen) ? chosen : pairs[0]?.[0] ?? "";
  }
}

function figure(id, text, exact, note) {
  const element = byId(`total-${id}`);
  element.replaceChildren(...text.split(/(\s\p{L}+(?:\s|$))/u).map((part) => {
    if (!/^\s\p{L}+\s?$/u.test(part)) return part;
    const unit = document.createElement("small"); // smaller than its number
    unit.textContent = part;
    return unit;
  }));
  element.dataset.exact = exact;
  element.title = exact;
  byId(`note-${id}`).textContent = note;
}

function showTotals(usage, total) {
  const sums = [...total.money].map(([currency, nanos]) => `${nanos} ${currency}`).join(" + ");
  const served = usage.teachers.filter((teacher) => teacher.served);
  const price = served.length === 1 && BigInt(served[0].nanos_per_sample)
    ? `${money(BigInt(served[0].nanos_per_sample), served[0].currency)} a sample` : "";
  figure("money", monies(total.money), sums, price);
  figure("computed", count(total.computed), String(total.computed), `of ${count(total.asked)} asked`);
  const began = new Date(usage.by === "hour" ? `${usage.periods[0]}:00Z` : `${usage.periods[0]}T00:00Z`);
  const busy = Number(total.device) / 1e6 / (usage.now - began);
  figure("device", duration(total.device), `${total.device} ns`, `one device would be ${share(busy, 1)} busy`);
  const tenants = new Set(usage.rows.map((row) => row.tenant)).size;
  figure("flops", flops(total.flops), `${total.flops} FLOPs`,
    `in ${several(usage.jobs().length, "job")} of ${several(tenants, "tenant")}`);
}

function several(n, what) {
  return `${count(n)} ${what}${n === 1 ? "" : "s"}`;
}

function firstLines() {
  byId("first-lines").textContent =
    `teacher = TeacherClient("${location.hostname}:8001", job="my-run")\nunix = Unix(teacher)`;
}

async function download() {
  try {
    const reply = await ask(`/v1/usage.csv?${range()}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await reply.blob());
    link.download = `preceptor-${range().replace("=", "-")}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
    say("The CSV file was downloaded.");
  } catch (error) {
    if (error instanceof Refused && [401, 403].includes(error.status)) signIn(error);
    else lost(error);
  }
}

// ------------------------------------------------------------ beginning

byId("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = byId("token").value.trim();
  const sendable = /^[\x21-\x7e]+$/.test(token);
  byId("refused").textContent = sendable ? "" : "This is no token: a header cannot carry its blanks or letters.";
  if (!sendable) return;
  sessionStorage.setItem(TOKEN, token);
  refresh();
});
byId("sign-out").addEventListener("click", signOut);
byId("csv").addEventListener("click", download);
for (const input of document.querySelectorAll("input[name=range]")) {
  input.addEventListener("change", async () => {
    if (await refresh()) say(`${nameOf(input.value)}: ${byId("total-computed").textContent} samples computed.`);
  });
}
for (const id of ["tenant", "measure"]) byId(id).addEventListener("change", () => page.usage && show());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(page.timer);
  else if (byId("sign-in").hidden) refresh();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page.usage && show());
refresh();
