const data = JSON.parse(document.getElementById("points").textContent);
const sprite = document.getElementById("sprite");
const details = document.getElementById("details");
const hidden = new Set();
const canvases = [...document.querySelectorAll("canvas.plane")];
let plane = data.planes[0], chosen = -1;

const colorOf = (k) => `rgb(${data.colors[k].join(",")})`;

// The square of a canvas that the points fill, in CSS pixels.
function frameOf(canvas) {
  const margin = 10, side = canvas.clientWidth - 2 * margin;
  return (value) => margin + (value / 10000) * side;
}

function placeOf(canvas, i) {
  const at = frameOf(canvas), points = data.models[canvas.dataset.model].planes[plane];
  return [at(points[2 * i]), canvas.clientWidth - at(points[2 * i + 1])];
}

function draw(canvas) {
  const side = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(side * ratio);
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.body);
  pen.scale(ratio, ratio);
  pen.lineWidth = 0.4;
  pen.strokeStyle = style.getPropertyValue("--muted");
  for (const i of data.order) {
    if (hidden.has(data.label[i])) continue;
    const [x, y] = placeOf(canvas, i);
    pen.beginPath();
    pen.arc(x, y, 3, 0, 2 * Math.PI);
    pen.fillStyle = colorOf(data.label[i]);
    pen.fill();
    pen.stroke();
  }
  if (chosen < 0) return;
  const [x, y] = placeOf(canvas, chosen);
  pen.lineWidth = 2;
  pen.strokeStyle = style.getPropertyValue("--text");
  pen.beginPath();
  pen.arc(x, y, 7, 0, 2 * Math.PI);
  pen.stroke();
}

function drawAll() {
  canvases.forEach(draw);
}

// The patch of a point, with a cross at the pixel.
function drawPatch(canvas, i) {
  const side = data.patch, row = Math.floor(i / data.columns), column = i % data.columns;
  const pen = canvas.getContext("2d"), size = canvas.width, middle = size / 2;
  pen.drawImage(sprite, column * side, row * side, side, side, 0, 0, size, size);
  for (const [width, color] of [[3, "#000"], [1, "#fff"]]) {
    pen.lineWidth = width;
    pen.strokeStyle = color;
    pen.strokeRect(middle - size / 16, middle - size / 16, size / 8, size / 8);
  }
}

function addLine(text, color) {
  const line = document.createElement("div");
  if (color) {
    const dot = document.createElement("span");
    dot.className = "dot";
    dot.style.background = color;
    line.append(dot);
  }
  line.append(text);
  details.querySelector(".lines").append(line);
}

function choose(i) {
  chosen = i;
  details.querySelector(".lines").replaceChildren();
  details.querySelector("canvas").hidden = i < 0;
  details.classList.toggle("chosen", i >= 0);
  if (i >= 0) {
    drawPatch(details.querySelector("canvas"), i);
    addLine(data.names[data.label[i]], colorOf(data.label[i]));
    data.models.forEach((model) => {
      const voted = data.names[model.neighbours[i]], said = data.names[model.predictions[i]];
      addLine(`${model.name}: neighbours ${voted}, predicted ${said}`);
    });
    const [x, y] = data.position[i];
    addLine(`${data.files[data.image[i]]}, x ${x}, y ${y}`);
  }
  drawAll();
}

function nearest(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const px = event.clientX - box.left, py = event.clientY - box.top;
  let best = -1, least = 14 * 14;
  data.label.forEach((label, i) => {
    if (hidden.has(label)) return;
    const [x, y] = placeOf(canvas, i);
    const distance = (x - px) ** 2 + (y - py) ** 2;
    if (distance < least) [best, least] = [i, distance];
  });
  return best;
}

for (const canvas of canvases) {
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse") return;
    const i = nearest(canvas, event);
    if (i >= 0 && i !== chosen) choose(i);
  });
  canvas.addEventListener("click", (event) => choose(nearest(canvas, event)));
}

for (const button of document.querySelectorAll("button[data-plane]")) {
  button.addEventListener("click", () => {
    plane = button.dataset.plane;
    for (const other of document.querySelectorAll("button[data-plane]"))
      other.setAttribute("aria-pressed", String(other === button));
    drawAll();
  });
}

const toggles = [...document.querySelectorAll("button[data-class]")];
function show(button, shown) {
  const k = Number(button.dataset.class);
  if (shown) hidden.delete(k);
  else hidden.add(k);
  button.setAttribute("aria-pressed", String(shown));
}
for (const button of toggles) {
  button.addEventListener("click", () => {
    show(button, button.getAttribute("aria-pressed") !== "true");
    drawAll();
  });
}
for (const button of document.querySelectorAll("button[data-all]")) {
  button.addEventListener("click", () => {
    toggles.forEach((toggle) => show(toggle, button.dataset.all === "true"));
    drawAll();
  });
}

new ResizeObserver(drawAll).observe(canvases[0]);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
sprite.decode().then(() => {
  for (const canvas of document.querySelectorAll("canvas[data-point]"))
    drawPatch(canvas, Number(canvas.dataset.point));
  document.body.dataset.ready = "true";
});
