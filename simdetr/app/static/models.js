// The detectors of a project in selects: which is in use, and which a training starts from.

import { h, put } from "./elements.js";

const START = "start"; // what the app was started with

// Fill a select; `others` are further [value, text] rows.
export function offerModels(select, models, others = []) {
  put(
    select,
    models.map((one) => h("option", { value: one.id }, `${one.title || one.id}${one.active ? " (in use)" : ""}`)),
    others.map(([value, text]) => h("option", { value }, text)),
  );
}

// The pretrained detector, not that of the training before; null where there is none.
export const pretrained = (models) => models.find((one) => one.id === START)?.id ?? null;

export const inUse = (models) => models.find((one) => one.active) ?? null;
