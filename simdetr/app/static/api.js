// The interface of the server: one function for a request, words for what went wrong.

export class ApiError extends Error {
  constructor(status, message, body = {}) {
    super(message);
    this.status = status;
    this.body = body;
  }

  // Worth trying again as it is: no answer, or the server's own trouble.
  get passing() {
    return this.status === 0 || this.status >= 500 || this.status === 429;
  }
}

// This tab's own name, kept over a reload; leases belong to it.
export const holder = (() => {
  let name = sessionStorage.getItem("simdetr.holder");
  if (!name) {
    name = crypto.randomUUID ? crypto.randomUUID() : `tab-${Date.now()}-${Math.random()}`;
    sessionStorage.setItem("simdetr.holder", name);
  }
  return name;
})();

export const author = () => localStorage.getItem("simdetr.author") ?? "";

export async function ask(method, path, { json, form, query, keepalive } = {}) {
  const headers = {};
  if (author()) headers["X-Author"] = encodeURIComponent(author());
  if (json !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(address(path, query), {
      method,
      headers,
      keepalive,
      body: form ?? (json === undefined ? undefined : JSON.stringify(json)),
    });
  } catch {
    throw new ApiError(0, "The server does not answer. Is `simdetr label` still running?");
  }
  if (answer.status === 204) return null;
  const text = await answer.text();
  let body = {};
  try {
    body = text ? JSON.parse(text) : null;
  } catch {
    if (answer.ok) throw new ApiError(500, "The server's answer could not be read.");
  }
  if (!answer.ok) throw new ApiError(answer.status, words(answer.status, body), body ?? {});
  return body;
}

function words(status, body) {
  const detail = body?.detail;
  if (typeof detail === "string") return detail[0].toUpperCase() + detail.slice(1);
  if (Array.isArray(detail)) {
    return detail
      .map((one) => `${one.loc.filter((part) => part !== "body" && part !== "query").join(" › ")}: ${one.msg}`)
      .join("; ");
  }
  if (status === 401)
    return "This page needs the token that `simdetr label` printed: open the address with ?token=… again.";
  return `The server refused (${status}).`;
}

export function address(path, query) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(query ?? {})) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined) pairs.append(name, one);
    }
  }
  const text = pairs.toString();
  return `/api${path}${text ? "?" + text : ""}`;
}

export const get = (path, query) => ask("GET", path, { query });
export const post = (path, json = {}, options = {}) => ask("POST", path, { json, ...options });
export const send = (method, path, json) => ask(method, path, { json });
