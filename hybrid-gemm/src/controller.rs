//! Adapting alpha while the link is shared with other tenants.
//!
//! Three rules. The paper's compares utilisations: EMAs of `U_c = link bytes / (T B_c)` and `U_h = HBM bytes / (T B_h)`; where the link
//! is more than τ busier alpha goes down a step (fewer bytes over the link), where HBM is, up; then it rests for some calls. It
//! counts this product's own bytes, so a link that others take looks idle to it, and it moves the wrong way.
//!
//! The makespan rule is robust to that: it estimates the rates that the product really gets, bytes over the time in which the
//! link (or HBM) had something of this product to carry, and sets alpha where both would finish together at those rates. A device
//! does not tell these times; it tells how long the blocks of each role worked. Output-stationary blocks wait for the link, and
//! weight-stationary ones for HBM, so their times stand for the two ([`Observation::of_call`]): where one role takes longer, what it
//! waits for counts as slower, and alpha moves until both take equally long. The third rule, [`Rule::Together`], goes there by steps,
//! without a model of the bytes.
//!
//! On a device alpha is a number in device memory that the blocks read, so a captured graph follows without being captured anew.

use crate::cost_model::AlphaTerms;
use crate::{Error, Prediction, Traffic};

/// What a call tells: its receipt, its duration, and how long link and HBM were busy with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observation {
    /// Duration in seconds.
    pub time_s: f64,
    /// Bytes over the link.
    pub link_bytes: f64,
    /// Bytes behind L2.
    pub hbm_bytes: f64,
    /// Seconds in which at least one transfer over the link was under way, or what stands for them; 0 where nothing does.
    pub link_busy_s: f64,
    /// The same for HBM.
    pub hbm_busy_s: f64,
    /// Seconds that a block of the output-stationary and of the weight-stationary role worked; 0 for a role without blocks.
    pub role_s: [f64; 2],
}

impl Observation {
    /// From what a device tells of a call: its duration, its receipt with the times of the roles, and what its prediction says of
    /// L2. The times of the roles stand for those of link and HBM, so every rule can be fed: [`Rule::Makespan`] wants a margin then.
    pub fn of_call(time_s: f64, role_s: [f64; 2], counted: &Traffic, predicted: &Prediction) -> Self {
        Observation {
            time_s,
            link_bytes: counted.link_bytes as f64,
            hbm_bytes: predicted.hbm_bytes as f64,
            link_busy_s: role_s[0],
            hbm_busy_s: role_s[1],
            role_s,
        }
    }
}

/// How alpha follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// The paper's: compare utilisations, take a step.
    Utilisation {
        /// Difference of utilisations that is tolerated.
        tau: f64,
        /// How far alpha moves.
        step: f64,
        /// Calls between two moves.
        dwell: u32,
    },
    /// Estimate the rates, finish together.
    Makespan {
        /// How far alpha stays from 0 and 1, where a role has no blocks and so no time: 0 for whoever has times of link and HBM
        /// themselves.
        margin: f64,
    },
    /// Compare the times of the two roles, take a step. Their blocks have equal columns, so where the link is the slower the
    /// output-stationary ones, which read more over it, take longer, and where HBM is, the weight-stationary ones. That holds where
    /// blocks have several columns each.
    Together {
        /// Ratio of times, less 1, that is tolerated.
        tolerance: f64,
        /// How far alpha moves, and how far it stays from 0 and 1, where a role has nothing to compare.
        step: f64,
        /// Calls between two moves.
        dwell: u32,
    },
}

impl Rule {
    /// The paper's rule; it does not give its constants, these are ours: τ = 0.1, steps of 1/16, four calls between two moves.
    pub const fn utilisation() -> Self {
        Rule::Utilisation { tau: 0.1, step: 1.0 / 16.0, dwell: 4 }
    }

    /// The makespan rule for a device, that tells times of roles: off the ends by 1/16.
    pub const fn makespan() -> Self {
        Rule::Makespan { margin: 1.0 / 16.0 }
    }

    /// Roles that finish together: within 10 %, in steps of 1/16, two calls between two moves.
    pub const fn together() -> Self {
        Rule::Together { tolerance: 0.1, step: 1.0 / 16.0, dwell: 2 }
    }

    /// Refuses steps past the middle, which leave no alpha between them, and what is tolerated below nothing.
    fn check(self) -> Result<(), Error> {
        let (tolerated, step, most) = match self {
            Rule::Makespan { margin } if (0.0..0.5).contains(&margin) => return Ok(()),
            Rule::Makespan { margin } => {
                return Err(Error::argument("margin", "at least 0, below 0.5", margin));
            }
            Rule::Utilisation { tau, step, .. } => (("tau", tau), step, 1.0),
            Rule::Together { tolerance, step, .. } => (("tolerance", tolerance), step, 0.5),
        };
        if !(step > 0.0 && step <= most) {
            return Err(Error::argument("step", format!("above 0, at most {most}"), step));
        }
        if !(tolerated.1.is_finite() && tolerated.1 >= 0.0) {
            return Err(Error::argument(tolerated.0, "a finite number, 0 or more", tolerated.1));
        }
        Ok(())
    }
}

/// Weight of a new observation in an exponential moving average.
const EMA: f64 = 0.2;

/// Sets alpha from observations.
#[derive(Debug, Clone, PartialEq)]
pub struct Controller {
    rule: Rule,
    terms: AlphaTerms,
    /// Nominal rates of link and HBM, in bytes per second.
    nominal: [f64; 2],
    /// Most that the link may be used, in bytes per second.
    link_budget: Option<f64>,
    alpha: f64,
    /// EMAs of what the rule watches: utilisations, or rates.
    averages: Option<[f64; 2]>,
    rest: u32,
}

impl Controller {
    /// Starts at `alpha`; the paper starts at 0, the frugal end for the link.
    ///
    /// # Errors
    /// [`Error::Argument`] for an alpha outside 0..=1, rates that are no positive numbers, or a rule's step or tolerance that cannot be.
    pub fn new(
        rule: Rule,
        terms: AlphaTerms,
        link_bytes_per_s: f64,
        hbm_bytes_per_s: f64,
        alpha: f64,
    ) -> Result<Self, Error> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(Error::argument("alpha", "0 to 1", alpha));
        }
        rule.check()?;
        for (argument, rate) in [("link_bytes_per_s", link_bytes_per_s), ("hbm_bytes_per_s", hbm_bytes_per_s)]
        {
            if !(rate.is_finite() && rate > 0.0) {
                return Err(Error::argument(argument, "a finite number above 0", rate));
            }
        }
        let nominal = [link_bytes_per_s, hbm_bytes_per_s];
        Ok(Controller { rule, terms, nominal, link_budget: None, alpha, averages: None, rest: 0 })
    }

    /// The share of output-stationary blocks for the next call.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Caps the share of the link that the makespan rule counts on, as a scheduler of several models does; `None` lifts the cap. Where
    /// times of roles stand for those of link and HBM (a margin above 0), HBM counts with its nominal rate under a cap.
    ///
    /// # Errors
    /// [`Error::Argument`] for a rate that is no positive number.
    pub fn set_link_budget(&mut self, bytes_per_s: Option<f64>) -> Result<(), Error> {
        if let Some(rate) = bytes_per_s
            && !(rate.is_finite() && rate > 0.0)
        {
            return Err(Error::argument("link_budget", "a finite number above 0", rate));
        }
        self.link_budget = bytes_per_s;
        Ok(())
    }

    /// Takes in what a call told, and moves alpha. Calls that moved nothing, or took no time, say nothing.
    pub fn observe(&mut self, call: &Observation) {
        let [link, hbm] = self.nominal;
        match self.rule {
            Rule::Utilisation { tau, step, dwell } => {
                let utilisation =
                    [call.link_bytes / (call.time_s * link), call.hbm_bytes / (call.time_s * hbm)];
                let Some([link, hbm]) = self.average(utilisation) else { return };
                if self.rest > 0 {
                    self.rest -= 1;
                    return;
                }
                let direction = match link - hbm {
                    excess if excess > tau => -1.0,
                    excess if excess < -tau => 1.0,
                    _ => return,
                };
                self.alpha = (self.alpha + direction * step).clamp(0.0, 1.0);
                self.rest = dwell;
            }
            Rule::Together { tolerance, step, dwell } => {
                if call.role_s.contains(&0.0) {
                    // Nothing to compare: off the end.
                    self.alpha = self.alpha.clamp(step, 1.0 - step);
                    return;
                }
                let Some([os, ws]) = self.average(call.role_s) else { return };
                if self.rest > 0 {
                    self.rest -= 1;
                    return;
                }
                let direction = match os / ws {
                    ratio if ratio > 1.0 + tolerance => -1.0,
                    ratio if ratio < 1.0 / (1.0 + tolerance) => 1.0,
                    _ => return,
                };
                self.alpha = (self.alpha + direction * step).clamp(step, 1.0 - step);
                self.rest = dwell;
                // Times with another alpha are others.
                self.averages = None;
            }
            Rule::Makespan { margin } => {
                let rates = [call.link_bytes / call.link_busy_s, call.hbm_bytes / call.hbm_busy_s];
                let within = |alpha: f64| alpha.clamp(margin, 1.0 - margin);
                let Some([link, hbm]) = self.average(rates) else {
                    // Off the end, where both roles have times.
                    self.alpha = within(self.alpha);
                    return;
                };
                let (link, hbm) = match self.link_budget {
                    None => (link, hbm),
                    // A role's time has in it what it waited for the link, which says nothing of HBM beside a smaller link.
                    Some(budget) => (link.min(budget), if margin > 0.0 { self.nominal[1] } else { hbm }),
                };
                self.alpha = within(self.terms.balance(link, hbm));
            }
        }
    }

    fn average(&mut self, new: [f64; 2]) -> Option<[f64; 2]> {
        if new.iter().any(|value| !value.is_finite() || *value <= 0.0) {
            return None;
        }
        let old = self.averages.unwrap_or(new);
        let averages = std::array::from_fn(|i| old[i] + EMA * (new[i] - old[i]));
        self.averages = Some(averages);
        Some(averages)
    }
}
