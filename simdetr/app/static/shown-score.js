// The score from which proposals are shown, chosen with the slider of the Label screen and kept in this browser.

const KEPT = "simdetr.min_score";

export const shownScore = () => Number(localStorage.getItem(KEPT) ?? 0.3);
export const isScoreChosen = () => localStorage.getItem(KEPT) !== null;
export const chooseScore = (score) => localStorage.setItem(KEPT, score);
