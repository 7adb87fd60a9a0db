//! Continuing a prompt.

use ndarray::ArrayView1;

use crate::{Error, Session};

/// How tokens are chosen.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f32,
    rng: fastrand::Rng,
}

impl Sampler {
    /// Chooses from `softmax(logits / temperature)` with a seeded generator; the likeliest token at temperature 0.
    ///
    /// # Errors
    /// A temperature that is negative or not finite.
    pub fn new(temperature: f32, seed: u64) -> Result<Self, Error> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::argument("temperature", "a finite number of at least 0", temperature));
        }
        Ok(Sampler { temperature, rng: fastrand::Rng::with_seed(seed) })
    }

    /// Chooses a token given its logits `[vocab_size]`.
    pub fn choose(&mut self, logits: ArrayView1<'_, f32>) -> u32 {
        let best = argmax(logits);
        if self.temperature == 0.0 {
            return best;
        }
        let max = logits[best as usize];
        let weight = |&logit: &f32| f64::from((logit - max) / self.temperature).exp();
        let mut left = self.rng.f64() * logits.iter().map(weight).sum::<f64>();
        for (token, logit) in logits.iter().enumerate() {
            left -= weight(logit);
            if left < 0.0 {
                return token as u32;
            }
        }
        best // Only rounding leads here.
    }
}

/// The likeliest token; the first of several.
pub fn argmax(logits: ArrayView1<'_, f32>) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Continues `prompt` by up to `max_tokens` tokens, each handed to `emit` as it is chosen; ends early at an end-of-sequence
/// token, which is not emitted.
///
/// # Errors
/// An empty prompt, tokens out of range, a sequence that grows too long, and whatever `emit` returns.
pub fn generate<E: From<Error>>(
    session: &mut Session<'_>,
    prompt: &[u32],
    max_tokens: usize,
    sampler: &mut Sampler,
    mut emit: impl FnMut(u32) -> Result<(), E>,
) -> Result<(), E> {
    let mut logits = session.prefill(prompt)?;
    for left in (0..max_tokens).rev() {
        let token = sampler.choose(logits.view());
        if session.model().config().eos_tokens.contains(&token) {
            break;
        }
        emit(token)?;
        if left > 0 {
            logits = session.decode(token)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn sampling_follows_the_softmax() {
        let logits = array![1.0f32, 3.0, 2.0, 3.0];
        assert_eq!(argmax(logits.view()), 1, "the first of several");
        assert_eq!(Sampler::new(0.0, 7).unwrap().choose(logits.view()), 1);

        for temperature in [0.5f32, 1.0, 2.0] {
            let exact: Vec<f64> = logits.iter().map(|&l: &f32| f64::from(l / temperature).exp()).collect();
            let sum: f64 = exact.iter().sum();
            let mut sampler = Sampler::new(temperature, 42).unwrap();
            let mut counts = [0u32; 4];
            for _ in 0..20_000 {
                counts[sampler.choose(logits.view()) as usize] += 1;
            }
            for (token, (count, exact)) in counts.iter().zip(exact).enumerate() {
                let (found, exact) = (f64::from(*count) / 20_000.0, exact / sum);
                // Four standard deviations are 0.014.
                assert!((found - exact).abs() < 0.014, "T {temperature}, token {token}: {found} for {exact}");
            }
        }
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(Sampler::new(temperature, 0).is_err(), "temperature {temperature}");
        }
    }

    #[test]
    fn the_seed_decides() {
        let logits = ndarray::Array1::<f32>::zeros(100);
        let draw = |seed| {
            let mut sampler = Sampler::new(1.0, seed).unwrap();
            (0..20).map(|_| sampler.choose(logits.view())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
