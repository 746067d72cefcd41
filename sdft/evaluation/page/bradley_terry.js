// Scores from pairwise votes by the model of Bradley and Terry (1952).

/**
 * wins[i][j]: how often i was preferred to j; a vote without preference counts half for each.
 * Returns {score, low, high} for each: log-strengths around their mean, with Wald intervals of 95 %.
 *
 * i is preferred to j with probability 1 / (1 + exp(s_j - s_i)). The log-likelihood is regularised by
 * one draw of each against an opponent of strength 0: without it, a subject that won every vote has no finite score.
 */
function bradleyTerry(wins) {
  const strengths = wins.map(() => 0);
  let information = [];
  for (let round = 0; round < 100; round++) {
    let slope;
    [slope, information] = slopeAndInformation(wins, strengths);
    const inverse = inverted(information);
    const step = inverse.map((row) => row.reduce((sum, value, j) => sum + value * slope[j], 0));
    const longest = Math.max(...step.map(Math.abs), 0);
    // Newton steps are bounded so that they cannot overshoot the maximum of this concave function and diverge.
    const pace = longest > 1 ? 1 / longest : 1;
    step.forEach((value, i) => { strengths[i] += pace * value; });
    if (longest < 1e-10) break;
  }
  const mean = strengths.reduce((sum, s) => sum + s, 0) / strengths.length;
  const covariance = inverted(information);
  return strengths.map((s, i) => {
    const spread = 1.959964 * Math.sqrt(centredVariance(covariance, i));
    return { score: s - mean, low: s - mean - spread, high: s - mean + spread };
  });
}

/** Gradient and negative Hessian of the log-likelihood. */
function slopeAndInformation(wins, strengths) {
  const slope = strengths.map((s) => 0.5 - logistic(s));
  const information = strengths.map((s, i) => strengths.map((_, j) => (i === j ? logistic(s) * logistic(-s) : 0)));
  for (let i = 0; i < wins.length; i++) {
    for (let j = 0; j < wins.length; j++) {
      const votes = i === j ? 0 : wins[i][j] + wins[j][i];
      if (votes === 0) continue;
      const chance = logistic(strengths[i] - strengths[j]);
      slope[i] += wins[i][j] - votes * chance;
      information[i][i] += votes * chance * (1 - chance);
      information[i][j] -= votes * chance * (1 - chance);
    }
  }
  return [slope, information];
}

function logistic(x) {
  return 1 / (1 + Math.exp(-x));
}

/** Variance of a strength minus the mean of all. */
function centredVariance(covariance, i) {
  const n = covariance.length;
  const weight = (j) => (i === j ? 1 : 0) - 1 / n;
  let sum = 0;
  for (let j = 0; j < n; j++) for (let k = 0; k < n; k++) sum += weight(j) * covariance[j][k] * weight(k);
  return sum;
}

/** Inverse of a positive definite matrix, by elimination; it needs no pivoting. */
function inverted(matrix) {
  const n = matrix.length;
  const rows = matrix.map((row, i) => [...row, ...row.map((_, j) => (i === j ? 1 : 0))]);
  for (let i = 0; i < n; i++) {
    const pivot = rows[i][i];
    rows[i] = rows[i].map((value) => value / pivot);
    for (let j = 0; j < n; j++) {
      const factor = rows[j][i];
      if (j !== i && factor !== 0) rows[j] = rows[j].map((value, k) => value - factor * rows[i][k]);
    }
  }
  return rows.map((row) => row.slice(n));
}
