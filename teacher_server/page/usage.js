// What GET /v1/usage says, summed in the ways that the page shows. Samples are Numbers (below 2^53); nanoseconds and
// money, in 1e-9 of a currency, are BigInts.

const COUNTS = ["candidates", "asked", "computed", "cached", "coalesced", "flops"];

export class Sum {
  constructor() {
    for (const name of COUNTS) this[name] = 0;
    this.device = 0n;
    this.money = new Map();
    this.cacheMoney = new Map(); // what the cached and coalesced would have cost
    this.selectionMoney = new Map(); // what those not asked about would have cost
  }

  add(row) {
    for (const name of COUNTS) this[name] += row[name];
    this.device += row.device;
    grow(this.money, row.currency, row.money);
    grow(this.cacheMoney, row.currency, BigInt(row.cached + row.coalesced) * row.price);
    grow(this.selectionMoney, row.currency, BigInt(row.candidates - row.asked) * row.price);
  }

  /** Samples that were answered without being computed for it. */
  get hits() { return this.cached + this.coalesced; }
  get answered() { return this.computed + this.hits; }
  /** Samples that the students saw and did not ask about. */
  get unasked() { return this.candidates - this.asked; }
  /** What full KD would have had computed. */
  get full() { return this.answered + this.unasked; }
  get fullMoney() {
    const all = new Map(this.money);
    for (const part of [this.cacheMoney, this.selectionMoney]) for (const [c, nanos] of part) grow(all, c, nanos);
    return all;
  }
  moneyIn(currency) { return this.money.get(currency) ?? 0n; }
}

function grow(map, key, amount) {
  map.set(key, (map.get(key) ?? 0n) + amount);
}

export class Usage {
  constructor(reply) {
    Object.assign(this, { periods: reply.periods, by: reply.by, teachers: reply.teachers, platform: reply.platform });
    this.now = new Date(reply.now);
    this.budgets = reply.budgets;
    const { rows } = reply;
    this.rows = rows.period.map((period, i) => {
      const [tenant, job, currency, price] = reply.jobs[rows.job[i]];
      const row = { period, tenant, job, currency, price: BigInt(price) };
      for (const name of COUNTS) row[name] = rows[name][i];
      row.device = BigInt(rows.device_nanoseconds[i]);
      row.money = BigInt(rows.money_nanos[i]);
      return row;
    });
    this.tenants = [...new Set([...this.rows.map((r) => r.tenant), ...this.budgets.map((b) => b.tenant)])].sort();
    this.currencies = [...new Set(this.rows.map((row) => row.currency))].sort();
  }

  /** Of one tenant, or ("") of all. */
  of(tenant) {
    if (!tenant) return this;
    const part = Object.create(Usage.prototype, Object.getOwnPropertyDescriptors(this));
    part.rows = this.rows.filter((row) => row.tenant === tenant);
    part.budgets = this.budgets.filter((budget) => budget.tenant === tenant);
    return part;
  }

  total() {
    const sum = new Sum();
    for (const row of this.rows) sum.add(row);
    return sum;
  }

  /** Map of name -> Sum. */
  sums(name) {
    const sums = new Map();
    for (const row of this.rows) {
      const key = name(row);
      if (!sums.has(key)) sums.set(key, new Sum());
      sums.get(key).add(row);
    }
    return sums;
  }

  /** A Sum for each period. */
  overTime() {
    const sums = this.periods.map(() => new Sum());
    for (const row of this.rows) sums[row.period].add(row);
    return sums;
  }

  /** Map of group -> [Sum for each period]: those with the largest totals, and the rest, two or more, as `others`. */
  stacked(name, size, most, others) {
    const totals = [...this.sums(name)].sort((a, b) => size(b[1]) - size(a[1]) || (a[0] < b[0] ? -1 : 1));
    const few = totals.length > most ? totals.slice(0, Math.min(most, totals.length - 2)) : totals;
    const kept = few.map(([key]) => key).sort();
    const left = totals.length - kept.length;
    const keys = left ? [...kept, others(left)] : kept;
    const groups = new Map(keys.map((key) => [key, this.periods.map(() => new Sum())]));
    for (const row of this.rows) {
      const key = groups.has(name(row)) ? name(row) : others(left);
      groups.get(key)[row.period].add(row);
    }
    return groups;
  }

  /** Each job's sum, with its tenant and name. */
  jobs() {
    return [...this.sums((row) => JSON.stringify([row.tenant, row.job]))].map(([key, sum]) => {
      const [tenant, job] = JSON.parse(key);
      return { tenant, job, sum };
    });
  }
}

/** When a budget will have run out at the rate of late: {state, at}. */
export function outlook(budget, now) {
  const [left, recent] = [Number(budget.left), Number(budget.recent)];
  const until = budget.until ? new Date(budget.until) : null;
  if (left <= 0) return { state: "spent", until };
  if (recent <= 0) return { state: "idle", until };
  const wait = (left / recent) * (now - new Date(budget.recent_since));
  const at = new Date(Math.min(now.getTime() + wait, 8e15));
  return until && at >= until ? { state: "lasts", until } : { state: "ends", at, wait, until };
}
