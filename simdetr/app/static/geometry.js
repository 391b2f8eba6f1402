// Boxes as [x0, y0, x1, y1] in image pixels, floats. Nothing here rounds.

export const HANDLES = {
  nw: [0, 0],
  n: [0.5, 0],
  ne: [1, 0],
  e: [1, 0.5],
  se: [1, 1],
  s: [0.5, 1],
  sw: [0, 1],
  w: [0, 0.5],
};

const between = (value, least, most) => Math.min(Math.max(value, least), most);

export function spanned([ax, ay], [bx, by], width, height) {
  const xs = [between(ax, 0, width), between(bx, 0, width)].sort((a, b) => a - b);
  const ys = [between(ay, 0, height), between(by, 0, height)].sort((a, b) => a - b);
  return [xs[0], ys[0], xs[1], ys[1]];
}

// Moved by (dx, dy), stopped at the edges of the image with its size kept.
export function moved([x0, y0, x1, y1], dx, dy, width, height) {
  const ox = between(dx, -x0, width - x1);
  const oy = between(dy, -y0, height - y1);
  return [x0 + ox, y0 + oy, x1 + ox, y1 + oy];
}

// A handle pulled by (dx, dy); beyond the other side the box turns over.
export function pulled(box, handle, dx, dy, width, height) {
  const [fx, fy] = HANDLES[handle];
  let [x0, y0, x1, y1] = box;
  if (fx === 0) x0 += dx;
  if (fx === 1) x1 += dx;
  if (fy === 0) y0 += dy;
  if (fy === 1) y1 += dy;
  return spanned([x0, y0], [x1, y1], width, height);
}

// The right and lower sides moved, at least a pixel from the others.
export function grown([x0, y0, x1, y1], dx, dy, width, height) {
  return [x0, y0, between(x1 + dx, Math.min(x0 + 1, width), width), between(y1 + dy, Math.min(y0 + 1, height), height)];
}

export const contains = ([x0, y0, x1, y1], [x, y], margin = 0) =>
  x >= x0 - margin && x <= x1 + margin && y >= y0 - margin && y <= y1 + margin;

export const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);

export const same = (a, b) => a.every((value, place) => value === b[place]);

// The handle of a box within `reach` image pixels of a point, the nearest one; null if none is.
export function handleAt([x0, y0, x1, y1], [x, y], reach) {
  let found = null;
  let best = reach;
  for (const [name, [fx, fy]] of Object.entries(HANDLES)) {
    const distance = Math.hypot(x - (x0 + fx * (x1 - x0)), y - (y0 + fy * (y1 - y0)));
    if (distance <= best) {
      best = distance;
      found = name;
    }
  }
  return found;
}
