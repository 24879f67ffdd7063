// Filters and orders the samples of a section; without this script all of them are shown as they were drawn.
for (const form of document.querySelectorAll("form.filters")) {
  const samples = [...form.parentElement.querySelectorAll("article.sample")];
  const shows = (element, wanted) => { element.hidden = !wanted; return wanted; };

  const apply = () => {
    const text = form.elements.text.value.trim().toLowerCase();
    const policy = form.elements.policy.value;
    const order = form.elements.order ? form.elements.order.value : "";
    // The score of a sample is that of the policy shown, or the lowest of all of them.
    const score = (sample) => {
      const values = [...sample.querySelectorAll(".card:not([hidden]) dd")]
        .filter((value) => value.dataset.score === order.slice(1)).map((value) => Number(value.dataset.value));
      const known = values.filter(Number.isFinite);
      return known.length ? Math[order[0] === "-" ? "max" : "min"](...known) : null;
    };
    let count = 0;
    for (const sample of samples) {
      const prompt = sample.querySelector(".prompt").textContent.toLowerCase();
      let found = false;
      for (const card of sample.querySelectorAll(".card")) {
        if (!shows(card, !policy || card.dataset.policy === policy)) continue;
        found ||= card.querySelector("pre").textContent.toLowerCase().includes(text);
      }
      count += shows(sample, found || prompt.includes(text)) ? 1 : 0;
    }
    const sign = order[0] === "-" ? -1 : 1;
    const scores = new Map(samples.map((sample) => [sample, order ? score(sample) : null]));
    const places = new Map(samples.map((sample, place) => [sample, place]));
    const sorted = [...samples].sort((a, b) => {
      const [first, second] = [scores.get(a), scores.get(b)];
      if (first === null || second === null) return (first === null) - (second === null) || places.get(a) - places.get(b);
      return sign * (first - second) || places.get(a) - places.get(b);
    });
    for (const sample of sorted) form.parentElement.append(sample);
    form.querySelector("output").value = `${count} of ${samples.length} prompts`;
  };

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}
