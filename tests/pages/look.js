// Run in a page that shows other pages in frames: what is wrong with each, as JSON in #found.
const channels = (color) => {
  const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
  return { rgb: [r, g, b], a };
};
const over = (front, back) => front.rgb.map((one, n) => front.a * one + (1 - front.a) * back[n]);
// WCAG 2.2: relative luminance and contrast ratio.
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((one) => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, other) => {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
};

function backgroundOf(element, view) {
  const svg = element.closest("svg");
  const paper = svg && svg.querySelector(".paper");
  if (paper) return channels(view.getComputedStyle(paper).fill).rgb;
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.unshift(channels(view.getComputedStyle(at).backgroundColor));
  return layers.reduce((back, one) => over(one, back), [255, 255, 255]);
}

function faintTexts(view) {
  const found = [], walker = view.document.createTreeWalker(view.document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest("style, script, title")) continue;
    const style = view.getComputedStyle(element), back = backgroundOf(element, view);
    const ink = over(channels(element.closest("svg") ? style.fill : style.color), back);
    const ratio = contrast(ink, back);
    count += 1;
    if (ratio < 4.5) found.push(`${node.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return { count, found };
}

function look(frame) {
  const view = frame.contentWindow, root = view.document.documentElement, texts = faintTexts(view);
  const box = (picture) => picture.getBoundingClientRect();
  const isEmpty = (one) => box(one).width < 1 || box(one).height < 1 || (one.tagName === "IMG" ? !one.naturalWidth
    : !one.querySelector("polyline, circle, rect:not(.paper), path"));
  return {
    width: root.clientWidth,
    overflow: root.scrollWidth - root.clientWidth,
    texts: texts.count,
    faint: texts.found,
    requests: view.performance.getEntriesByType("resource").map((one) => one.name),
    empty: [...view.document.querySelectorAll("svg, img")].filter(isEmpty).length,
    pictures: view.document.querySelectorAll("svg, img").length,
    errors: view.errors,
    paper: view.getComputedStyle(view.document.body).backgroundColor,
  };
}

addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    try { found[frame.name] = look(frame); } catch (error) { found[frame.name] = { failed: String(error.stack) }; }
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
