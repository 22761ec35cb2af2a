// The slider of an episode: its pictures, masks and numbers at one step.
"use strict";

const SECONDS = 1 / 20; // of a step: the control rate

for (const walk of document.querySelectorAll(".walk")) {
  const steps = JSON.parse(walk.querySelector("script").textContent);
  const slider = walk.querySelector("input[type=range]");
  const button = walk.querySelector("button");
  const cursors = walk.querySelectorAll(".cursor");
  let timer = null;

  function show() {
    const i = Number(slider.value), step = steps[i];
    for (const image of walk.querySelectorAll("[data-picture]")) {
      const name = image.dataset.picture;
      const kind = /_(rgb|depth)$/.test(name) ? "webp" : "png";
      image.src = `data:image/${kind};base64,${step.pictures[name]}`;
    }
    for (const text of walk.querySelectorAll("[data-of]")) {
      const [which, key, n] = text.dataset.of.split("/");
      text.textContent = key in step[which] ? step[which][key][n].toFixed(2) : "not";
    }
    for (const cursor of cursors) {
      const width = cursor.ownerSVGElement.viewBox.baseVal.width;
      cursor.setAttribute("transform", `translate(${(width * i) / Math.max(1, steps.length - 1)})`);
    }
    walk.querySelector("output").textContent = `${step.step} of ${steps.at(-1).step}`;
    slider.setAttribute("aria-valuetext", `${step.step}: ${spoken(step)}`);
  }

  function spoken(step) {
    const told = [];
    for (const [key, name] of [["grasp", "holds the target"], ["pos", "base"], ["obj", "object"]])
      for (const which of ["predicted", "true"])
        if (key in step[which])
          told.push(`${name} ${which} ${step[which][key].map((x) => x.toFixed(2)).join(" ")}`);
    return told.join(", ");
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  }

  function advance() {
    slider.value = Number(slider.value) + 1;
    show();
    if (Number(slider.value) === steps.length - 1) pause();
  }

  button.addEventListener("click", () => {
    if (timer !== null) return pause();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(advance, 1000 * SECONDS);
  });
  slider.addEventListener("input", show);
  for (const box of walk.querySelectorAll("input[type=checkbox]"))
    box.addEventListener("change", () => walk.classList.toggle(`no-${box.value}`, !box.checked));
  show();
}
