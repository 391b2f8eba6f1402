// Runs of a project: asked for once, and every second only while one is at work.

import { get } from "./api.js";

const EVERY_MS = 1000;
const SOON_MS = 400; // for short runs that somebody waits for
export const AT_WORK = new Set(["queued", "running"]);
export const KINDS = {
  train: "Training",
  detect: "Detection",
  order: "Ordering",
  embed: "Clustering",
  autolabel: "Few-shot",
  mine: "First proposals",
};

// What its state is called: a training that was stopped and can go on from a step is paused.
export const stateOf = (run) =>
  run.state === "cancelled" && run.kind === "train" && run.checkpoint ? "paused" : run.state;

// Not one whose boxes were only to be looked at ("Before and after"), once it has ended.
export const isForGood = (run) => run.parameters.propose !== false || AT_WORK.has(run.state);

export class RunWatch extends EventTarget {
  runs = [];
  #project = null;
  #timer = null;

  get active() {
    return (
      this.runs.find((run) => run.state === "running") ?? this.runs.findLast((run) => run.state === "queued") ?? null
    );
  }

  follow(project) {
    this.stop();
    this.#project = project;
    this.look();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#project = null;
    this.runs = [];
    this.dispatchEvent(new Event("runs"));
  }

  // Ask now; again after a second while a run is queued or running.
  async look() {
    clearTimeout(this.#timer);
    const project = this.#project;
    if (!project) return;
    try {
      const { runs } = await get(`/projects/${project}/runs`, { limit: 50 });
      if (project !== this.#project) return;
      this.runs = runs;
      this.dispatchEvent(new Event("runs"));
    } catch {
      /* the screens say it; the next look may work */
    }
    clearTimeout(this.#timer);
    if (this.active) this.#timer = setTimeout(() => this.look(), EVERY_MS);
  }
}

// The run once it has ended; `waits(run)` hears of it before. An error if it did not do what it was to do.
export async function finished(run, waits = () => {}) {
  while (AT_WORK.has(run.state)) {
    waits(run);
    await new Promise((resolve) => setTimeout(resolve, SOON_MS));
    ({ run } = await get(`/runs/${run.id}`, { since: 1e9 }));
  }
  if (run.state !== "done") throw new Error(run.error ?? run.message ?? "The run did not finish.");
  return run;
}

// How long a step of the last training took here, in seconds; null where there was none.
export async function secondsPerStep(runs) {
  const last = runs.find((run) => ["train", "autolabel"].includes(run.kind) && run.done && !AT_WORK.has(run.state));
  if (!last) return null;
  const { metrics } = await get(`/runs/${last.id}`, { since: 0 }).catch(() => ({ metrics: [] }));
  return metrics.findLast((row) => row.seconds_per_step)?.seconds_per_step ?? null;
}

// Ask for a run and its metrics each second until it ends. `seen(run, rows)` gets all rows so far.
export class RunFeed {
  #rows = [];
  #next = 0;
  #ended = false;

  constructor(id, seen, failed) {
    this.id = id;
    this.seen = seen;
    this.failed = failed;
    this.#look();
  }

  stop() {
    this.#ended = true;
    clearTimeout(this.timer);
  }

  again() {
    clearTimeout(this.timer);
    this.#look();
  }

  async #look() {
    try {
      const { run, metrics, next } = await get(`/runs/${this.id}`, { since: this.#next });
      if (this.#ended) return;
      this.#rows.push(...metrics.filter((row) => row.n >= this.#next || !this.#rows.length));
      this.#next = next;
      this.seen(run, this.#rows);
      if (AT_WORK.has(run.state)) this.timer = setTimeout(() => this.#look(), EVERY_MS);
    } catch (error) {
      if (this.#ended) return;
      this.failed(error);
      if (error.passing) this.timer = setTimeout(() => this.#look(), 3 * EVERY_MS);
    }
  }
}
