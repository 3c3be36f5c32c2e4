// Formats numbers, ages and times for people.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const minute = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const shortDay = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric" });

/** An unknown value is a dash, never a zero. */
export const UNKNOWN = "–";

/** At most five digits: `0.4`, `12`, `3,481`, `1.2M`. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size >= 100_000) return compact.format(value);
  return size < 10 ? fine.format(value) : grouped.format(value);
}

/** `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 2 h`. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return UNKNOWN;
  if (seconds < 1) return `${fine.format(Math.max(0, seconds))} s`;
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  const units = [["d", 86_400], ["h", 3_600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => whole >= size);
  const [unit, size] = units[first];
  const [nextUnit, nextSize] = units[first + 1];
  const rest = Math.floor((whole % size) / nextSize);
  return `${Math.floor(whole / size)} ${unit}${rest ? ` ${rest} ${nextUnit}` : ""}`;
}

/** `just now`, `12 s ago`. */
export function ago(milliseconds) {
  return milliseconds < 1000 ? "just now" : `${duration(milliseconds / 1000)} ago`;
}

/** The local time of day, with the date if it is not today. */
export function timeOfDay(milliseconds, now = Date.now()) {
  const time = clock.format(milliseconds);
  return day.format(milliseconds) === day.format(now) ? time : `${day.format(milliseconds)}, ${time}`;
}

/** The local time of day or, if it is not today, the date and the minute: `18:00:11`, `29 Nov 18:00`. */
export function shortTime(milliseconds, now = Date.now()) {
  if (day.format(milliseconds) === day.format(now)) return clock.format(milliseconds);
  return `${shortDay.format(milliseconds)} ${minute.format(milliseconds)}`;
}

/** `91.5%`. Only nothing is 0%, and only everything is 100%. */
export function share(ratio) {
  return percent.format(ratio <= 0 || ratio >= 1 ? ratio : Math.min(0.999, Math.max(0.001, ratio)));
}

/** The local time of day to the millisecond. */
export function preciseTimeOfDay(milliseconds) {
  const fraction = String(Math.floor(milliseconds) % 1000).padStart(3, "0");
  return `${timeOfDay(milliseconds)}.${fraction}`;
}
