// Returns the focus to the question, but not on a phone, whose keyboard would cover the answer.
() => {
  const lost = [document.body, null].includes(document.activeElement) || document.activeElement.closest("#ask, #stop");
  if (lost && !matchMedia("(pointer: coarse)").matches) document.querySelector("#question textarea")?.focus();
}
