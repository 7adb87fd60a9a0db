//! Exact prefill: the new tokens see each other in 16 bits and the cached ones as codes.
//!
//! Dense attention over the new tokens and this crate's over the cached ones pass one softmax state on, in either order.

use attention::gpu as dense_gpu;
use attention::reference as dense;
use attention::testing::{Comparison, Tolerance};
use attention::{AttentionSpec, Element, FaultCode, HeadsView, Mask, PageLayout, RaggedKv, RaggedView};
use cuda::status::Fault;
use cuda::storage::Storage;
use emulator::rig::Rig;
use half::{bf16, f16};
use homomorphic_quant::reference;
use homomorphic_quant::reference::Prefill as Mode;

use super::{Case, Inputs16, Rows, State, Step, inputs_with_room, prefill, widened};
use crate::close::assert_close;
use crate::sequences::{Cached, Shape, Tokens};

emulator::device_test!(
    continues_dense_attention_over_the_new_tokens,
    dense_kernels_and_these_pass_their_states_on,
    sinks_that_nobody_attends_to_are_a_bad_length,
);

/// A case whose new tokens are not cached, and what they are.
struct Exact<E> {
    case: Case,
    /// What the new tokens see of each other: the window without its sinks, all of which are cached already.
    dense: AttentionSpec,
    inputs: Inputs16<E>,
    /// Of each sequence.
    new: Vec<Tokens<E>>,
}

impl<E: Element> Exact<E> {
    /// `lens` are (new tokens, cached tokens) of each sequence.
    fn new(shape: Shape, mask: Mask, lens: &[(usize, usize)]) -> Self {
        let case = Case { mask, mode: Mode::Exact, ..Case::new(shape, lens) };
        let without_sinks = match mask {
            Mask::SlidingWindow { window, .. } => Mask::SlidingWindow { window, sinks: 0 },
            other => other,
        };
        let tokens = lens.iter().zip(77..);
        Exact {
            dense: AttentionSpec { mask: without_sinks, ..case.spec() },
            inputs: inputs_with_room(&case, 128, 21),
            new: tokens.map(|(&(new, _), seed)| Tokens::new(&shape, new, case.kinds, seed)).collect(),
            case,
        }
    }

    fn name<R: Rig>(&self, rig: &R) -> String {
        format!("{:?} as {} on {}", self.case, E::DTYPE, rig.name())
    }

    /// First row of each sequence, then one past the last.
    fn rows(&self) -> Vec<usize> {
        self.case.cu_queries().into_iter().map(|query| query as usize * self.case.shape.q_heads).collect()
    }

    /// What the reference's exact prefill gives. The new tokens are cached then.
    fn expected(&mut self) -> Rows {
        let (rows, Shape { q_heads, kv_heads, dims, .. }) = (self.rows(), self.case.shape);
        let q = widened(&self.inputs.q);
        let (mut out, mut lse) =
            (vec![f32::NAN; self.case.rows() * dims.1], vec![f32::NAN; self.case.rows()]);
        let Cached { cache, sequences, .. } = &mut self.inputs.cached;
        for (s, (sequence, new)) in sequences.iter_mut().zip(&self.new).enumerate() {
            let rows = rows[s]..rows[s + 1];
            let (k, v) = (widened(&new.k), widened(&new.v));
            let view = |x, heads, dim| HeadsView::nhd(x, new.len, heads, dim).expect("vectors of new tokens");
            let q = view(&q[rows.start * dims.0..rows.end * dims.0], q_heads, dims.0);
            let (k, v) = (view(&k, kv_heads, dims.0), view(&v, kv_heads, dims.1));
            let (out, lse) = (&mut out[rows.start * dims.1..rows.end * dims.1], &mut lse[rows]);
            reference::prefill(&self.case.spec(), cache, sequence, q, k, v, Mode::Exact, out, lse)
                .expect("a case");
        }
        (out.into_iter().map(f64::from).collect(), lse.into_iter().map(f64::from).collect())
    }

    /// The oracle's state over the new tokens, in its normalised form m = lse, l = 1, O = out.
    fn dense_state(&self) -> State {
        let (rows, Shape { q_heads, kv_heads, dims, .. }) = (self.rows(), self.case.shape);
        let mut state = State { o: Vec::new(), ml: Vec::new() };
        for (s, new) in self.new.iter().enumerate() {
            let q = &self.inputs.q[rows[s] * dims.0..rows[s + 1] * dims.0];
            let view = |x, heads, dim| HeadsView::nhd(x, new.len, heads, dim).expect("vectors of new tokens");
            let kv = RaggedKv::single(view(&new.k, kv_heads, dims.0), view(&new.v, kv_heads, dims.1));
            let q = RaggedView::single(view(q, q_heads, dims.0)).expect("queries");
            let kv = kv.expect("keys and values");
            let dense = dense::prefill_parallel(&self.dense, &q, &kv, dense::Probabilities::Exact);
            let dense = dense.expect("a case");
            state.o.extend(dense.out.iter().map(|x| *x as f32));
            state.ml.extend(dense.lse.iter().flat_map(|lse| [*lse as f32, 1.0]));
        }
        state
    }
}

impl<E: Element + Storage> Exact<E> {
    /// The state that the dense kernel leaves over the new tokens, after `before` or anew.
    fn dense_step<R: Rig>(&self, rig: &R, before: Option<&State>) -> State {
        let Shape { kv_heads, dims, .. } = self.case.shape;
        let all = |of: fn(&Tokens<E>) -> &Vec<E>| -> Vec<E> {
            self.new.iter().flat_map(|new| of(new).iter().copied()).collect()
        };
        let fail = |error: attention::Error| -> ! { panic!("{}: {error}", self.name(rig)) };
        let layout = |dim| PageLayout::nhd(1, kv_heads, dim);
        let tokens = self.case.queries();
        let plan = dense_gpu::PrefillPlan::new(dense_gpu::PrefillConfig {
            spec: self.dense,
            batch: self.new.len(),
            num_queries: tokens,
            max_kv_len: tokens,
            cache: dense_gpu::CacheLayout::Contiguous { tokens, k: layout(dims.0), v: layout(dims.1) },
            carry: true,
            kernel: dense_gpu::PrefillKernel::MmaSync,
        })
        .unwrap_or_else(|error| fail(error));
        let planner =
            dense_gpu::PrefillTiles::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
        let kernel =
            dense_gpu::Prefill::<_, E>::prepare(rig.device(), &plan).unwrap_or_else(|error| fail(error));
        let (q, k, v) =
            (rig.upload(&self.inputs.q), rig.upload(&all(|new| &new.k)), rig.upload(&all(|new| &new.v)));
        let cu_queries = self.case.cu_queries();
        let lens: Vec<u32> = self.new.iter().map(|new| new.len as u32).collect();
        let (kv_start, kv_len) = (rig.upload(&cu_queries[..self.new.len()]), rig.upload(&lens));
        let cu_queries = rig.upload(&cu_queries);
        let mut status = rig.zeroed::<u64>(1);
        let mut workspace = rig.workspace(plan.workspace());
        let (mut o, mut ml) = match before {
            Some(state) => (rig.upload(&state.o), rig.upload(&state.ml)),
            None => (rig.poisoned(self.case.rows() * dims.1), rig.poisoned(self.case.rows() * 2)),
        };
        let args = dense_gpu::PrefillTilesArgs {
            cu_queries: &rig.view(&cu_queries),
            kv_len: &rig.view(&kv_len),
            block_table: None,
            kv_start: Some(&rig.view(&kv_start)),
            status: rig.view_mut(&mut status),
        };
        let mut tiles = planner
            .run(rig.queue(), args, rig.workspace_view(&mut workspace))
            .unwrap_or_else(|error| fail(error));
        let inputs = dense_gpu::PrefillInputs {
            q: &rig.view(&q),
            k: &rig.view(&k),
            v: &rig.view(&v),
            block_table: None,
        };
        let state = dense_gpu::PrefillState {
            o: rig.view_mut(&mut o),
            ml: rig.view_mut(&mut ml),
            resume: before.is_some(),
        };
        kernel.run_step(rig.queue(), inputs, state, &mut tiles).unwrap_or_else(|error| fail(error));
        assert_eq!(Fault::decode(rig.download(&status)[0]), None, "{}", self.name(rig));
        State { o: rig.download(&o), ml: rig.download(&ml) }
    }
}

/// Masks, and (new, cached) tokens of sequences that they suit.
fn cases() -> [(Mask, [(usize, usize); 3]); 3] {
    let window = |sinks| Mask::sliding_window(60, sinks).expect("a window");
    [
        // Fewer cached tokens than sinks, none, a part of a block, several blocks.
        (Mask::Causal, [(20, 150), (33, 0), (7, 3)]),
        // Windows that end within the new tokens.
        (window(0), [(70, 200), (1, 64), (40, 36)]),
        // The sinks are seen from afar, by queries that see nothing else of the cache, and once only by those that are near.
        (window(4), [(70, 200), (1, 64), (40, 4)]),
    ]
}

/// Dense attention leaves the state of the new tokens, and the kernel finishes it.
fn continues_dense_attention_over_the_new_tokens<R: Rig>(rig: &R) {
    for (mask, lens) in cases() {
        let mut exact = Exact::<f16>::new(Shape::new((4, 2), 64, (2, 4), 32), mask, &lens);
        let (case, state) = (&exact.case, exact.dense_state());
        let step = Step::Finish(&state);
        let found = prefill(rig, case, &exact.inputs, &case.cu_queries(), &case.lens(), step);
        let name = exact.name(rig);
        assert_eq!(found.fault, None, "{name}");
        assert_eq!(found.state, state, "{name}: the state is only read");
        let (out, lse) = exact.expected();
        assert_close((&found.out, &found.lse), (&out, &lse), 64, &name);
    }
}

/// The kernels themselves, dense attention first or last. The dense kernel rounds its probabilities to bf16.
fn dense_kernels_and_these_pass_their_states_on<R: Rig>(rig: &R) {
    for (mask, lens) in cases() {
        let mut exact = Exact::<bf16>::new(Shape::new((4, 2), 128, (4, 4), 64), mask, &lens);
        let case = &exact.case;
        let (cu_queries, cached) = (case.cu_queries(), case.lens());
        let run = |step| prefill(rig, case, &exact.inputs, &cu_queries, &cached, step);

        let new = exact.dense_step(rig, None);
        let last = run(Step::Finish(&new));
        let anything = State { o: vec![f32::NAN; new.o.len()], ml: vec![f32::NAN; new.ml.len()] };
        let first = run(Step::Keep(&anything, false));
        let both = exact.dense_step(rig, Some(&first.state));
        let name = exact.name(rig);
        assert_eq!((last.fault, first.fault), (None, None), "{name}");

        let (out, lse) = exact.expected();
        let tolerance = Tolerance::tensor_core::<bf16>();
        Comparison::new(&last.out, &out, tolerance).assert(format_args!("out of dense, then codes: {name}"));
        Comparison::new(&last.lse, &lse, Tolerance::new(1e-2, 1e-5))
            .assert(format_args!("lse of dense, then codes: {name}"));
        let (found_out, found_lse) = both.output(128);
        Comparison::of_f64(&found_out, &out, tolerance)
            .assert(format_args!("out of codes, then dense: {name}"));
        Comparison::of_f64(&found_lse, &lse, Tolerance::new(1e-2, 1e-5))
            .assert(format_args!("lse of codes, then dense: {name}"));
        // One state, whichever came first.
        let out: Vec<f64> = last.out.iter().map(|x| f64::from(x.to_f32())).collect();
        Comparison::of_f64(&found_out, &out, Tolerance::new(2e-3, <bf16 as Element>::DTYPE.epsilon()))
            .assert(format_args!("out of both orders: {name}"));
        let lse: Vec<f64> = last.lse.iter().map(|x| f64::from(*x)).collect();
        Comparison::of_f64(&found_lse, &lse, Tolerance::LSE)
            .assert(format_args!("lse of both orders: {name}"));
    }
}

/// New tokens beyond the window miss sinks that are new too: the sequence is refused rather than wrong.
fn sinks_that_nobody_attends_to_are_a_bad_length<R: Rig>(rig: &R) {
    let mask = Mask::sliding_window(60, 4).expect("a window");
    // As many new tokens as the window sees are right without any sink in the cache, and more once all sinks are there.
    for refused in [(70, 0), (61, 0), (70, 3)] {
        let lens = [(60, 0), refused, (60, 3), (70, 4)];
        let mut exact = Exact::<f16>::new(Shape::new((4, 2), 64, (2, 4), 32), mask, &lens);
        let state = exact.dense_state();
        let (case, rows) = (&exact.case, exact.rows());
        let run = |step| prefill(rig, case, &exact.inputs, &case.cu_queries(), &case.lens(), step);
        let (finished, whole) = (run(Step::Finish(&state)), run(Step::Whole));
        let name = exact.name(rig);
        let fault = Some(Fault { code: FaultCode::BadLength as u32, index: 1 });
        assert_eq!((finished.fault, whole.fault), (fault, fault), "{name}");

        // Its queries see nothing here: what dense attention saw is left.
        let bad = rows[1]..rows[2];
        assert!(whole.lse[bad.clone()].iter().all(|lse| *lse == f32::NEG_INFINITY), "{name}");
        assert!(whole.out[bad.start * 64..bad.end * 64].iter().all(|x| *x == f16::ZERO), "{name}");
        let (dense, dense_lse) = state.output(64);
        let (out, lse) = exact.expected();
        for rows in [0..rows[1], rows[2]..rows[4]] {
            let values = rows.start * 64..rows.end * 64;
            let found = (&finished.out[values.clone()], &finished.lse[rows.clone()]);
            assert_close(found, (&out[values], &lse[rows]), 64, &name);
        }
        let values = bad.start * 64..bad.end * 64;
        let found = (&finished.out[values.clone()], &finished.lse[bad.clone()]);
        assert_close(found, (&dense[values], &dense_lse[bad.clone()]), 64, &name);
        let missed = lse[bad.end - 1] - dense_lse[bad.end - 1];
        assert!(missed > 1e-3, "{name}: the last query misses sinks, its lse by {missed}");
    }
}
