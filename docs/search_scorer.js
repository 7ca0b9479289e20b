// How the search of the site ranks what it finds. A heading that holds the whole query comes before the pages whose
// headings hold its words apart: "out of memory" leads to the section of that name. Sphinx ranks both alike.
var Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) => (kind === "title" ? score + 10 : score),

  // Sphinx's own values.
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
