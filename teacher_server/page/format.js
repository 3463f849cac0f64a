// Numbers as people read them, in their own way of writing. Counts and money are exact, whatever their size.

const whole = new Intl.NumberFormat();
const short = new Intl.NumberFormat(undefined, { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
const percents = new Intl.NumberFormat(undefined, {
  style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1,
});
const SI = ["", "k", "M", "G", "T", "P", "E", "Z"];
const formats = new Map();

/** A Number below 2^53, or a BigInt. */
export function count(n) {
  return whole.format(n);
}

/** Decimals that say so many 1e-9 exactly; as with cents, at least two. */
export function places(nanos) {
  const rest = (nanos < 0n ? -nanos : nanos) % 1_000_000_000n;
  return Math.max(2, String(rest).padStart(9, "0").replace(/0+$/, "").length);
}

/** BigInt of 1e-9 of the currency. Exact: Intl reads the decimal number as a text, not as a Number. */
export function money(nanos, currency, digits = places(nanos)) {
  const key = `${currency} ${digits}`;
  if (!formats.has(key)) {
    const style = currency ? { style: "currency", currency } : {};
    formats.set(key, new Intl.NumberFormat(undefined, {
      ...style, minimumFractionDigits: digits, maximumFractionDigits: digits,
    }));
  }
  const text = String(nanos < 0n ? -nanos : nanos).padStart(10, "0");
  return formats.get(key).format(`${nanos < 0n ? "-" : ""}${text.slice(0, -9)}.${text.slice(-9)}`);
}

/** A Map of currency -> nanos: one sum for each, as they cannot be added. */
export function monies(sums, digits) {
  const parts = [...sums].filter(([, nanos]) => nanos !== 0n || sums.size === 1);
  if (!parts.length) return sums.size ? money(0n, [...sums.keys()][0], digits) : "–";
  return parts.map(([currency, nanos]) => money(nanos, currency, digits)).join(" + ");
}

export function share(part, all) {
  return all > 0 ? percents.format(part / all) : "–";
}

/** BigInt nanoseconds, to about three digits. */
export function duration(nanoseconds) {
  const seconds = Number(nanoseconds) / 1e9;
  if (seconds === 0) return "0 s";
  if (seconds < 1e-3) return `${short.format(seconds * 1e6)} µs`;
  if (seconds < 1) return `${short.format(seconds * 1e3)} ms`;
  if (seconds < 60) return `${short.format(seconds)} s`;
  const rounded = Math.round(seconds);
  if (rounded < 3600) return `${Math.floor(rounded / 60)} min ${String(rounded % 60).padStart(2, "0")} s`;
  const minutes = Math.round(seconds / 60);
  return `${count(Math.floor(minutes / 60))} h ${String(minutes % 60).padStart(2, "0")} min`;
}

export function flops(number) {
  let power = 0;
  while (number >= 999.5 && power < SI.length - 1) {
    number /= 1000;
    power += 1;
  }
  return `${number === 0 ? "0" : short.format(number)} ${SI[power]}FLOPs`;
}

/** A short number for an axis. */
export const compact = new Intl.NumberFormat(undefined, { notation: "compact", maximumSignificantDigits: 3 });
export const decimal = new Intl.NumberFormat(undefined, { maximumFractionDigits: 2 });

const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const dayHour = new Intl.DateTimeFormat(undefined, {
  month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23", timeZone: "UTC",
});
const dayOnly = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", timeZone: "UTC" });
const hourOnly = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit", minute: "2-digit", hourCycle: "h23", timeZone: "UTC",
});

export function timeOfDay(date) {
  return clock.format(date);
}

/** "2026-01-31" or "2026-01-31T21", a UTC day or hour. */
export function period(name, brief = false) {
  if (name.length === 10) return dayOnly.format(new Date(`${name}T00:00Z`));
  return (brief ? hourOnly : dayHour).format(new Date(`${name}:00Z`));
}

export function moment(date) {
  return `${dayHour.format(date)} UTC`;
}

/** Milliseconds, roughly. */
export function about(milliseconds) {
  const minutes = Math.max(1, Math.round(milliseconds / 60e3));
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.round(minutes / 60);
  if (hours < 48) return `${hours} h`;
  const days = Math.round(hours / 24);
  return days <= 730 ? `${count(days)} days` : "over two years";
}
