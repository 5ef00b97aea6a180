// Opens the hit whose card is clicked.
element.addEventListener("click", (event) => {
  const card = event.target.closest("button[data-hit]");
  if (card) trigger("click", { hit: card.dataset.hit });
});
