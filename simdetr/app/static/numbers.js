// Numbers and sentences as people read them. What is not known is a dash, never a zero.

export const DASH = "—";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : DASH);

export function decimal(value, digits = 3) {
  if (!known(value)) return DASH;
  if (value !== 0 && Math.abs(value) < 10 ** -digits) return value.toExponential(1);
  return value.toFixed(digits);
}

export const percent = (share, digits = 0) => (known(share) ? `${(share * 100).toFixed(digits)} %` : DASH);

// A score, such as average precision: a share in [0, 1], in percent as everywhere.
export const score = (share) => percent(share, 1);

// An estimate: a digit after the point where it is small and no whole number.
export const about = (value) => (known(value) && value < 10 && value % 1 ? decimal(value, 1) : count(value));

export function bytes(value) {
  if (!known(value)) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${value.toFixed(place && value < 10 ? 1 : 0)} ${units[place]}`;
}

export function duration(seconds) {
  if (!known(seconds)) return DASH;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export const seconds = (from, to) => (from ? ((to ? new Date(to) : new Date()) - new Date(from)) / 1000 : null);

// Times are ISO 8601, or seconds since 1970 in the lines of a run.
export const when = (time) => new Date(typeof time === "number" ? time * 1000 : time);

export const clock = (time) =>
  time ? when(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : DASH;

export const day = (time) =>
  time ? new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : DASH;

export const short = (value) =>
  known(value)
    ? Math.abs(value) >= 1e9
      ? `${(value / 1e9).toFixed(2)} G`
      : Math.abs(value) >= 1e6
        ? `${(value / 1e6).toFixed(2)} M`
        : Math.abs(value) >= 1e4
          ? `${(value / 1e3).toFixed(1)} k`
          : count(value)
    : DASH;

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export const sentence = (text) =>
  text ? text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".") : "";
