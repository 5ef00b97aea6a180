// Saves the picture of a figure.
element.addEventListener("click", (event) => {
  const figure = event.target.closest("button[data-save]")?.closest("figure");
  if (!figure) return;
  const link = document.createElement("a"), image = figure.querySelector("img");
  link.href = image.src;
  link.download = `${image.alt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}.jpg`;
  link.click();
});
