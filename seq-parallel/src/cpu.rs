//! A list of tiles on the CPU: the compute step of every scheme here, in f32 with f32 state.

use attention::softmax_state::Raw;
use attention::{AttentionSpec, Element, HeadsView};

use crate::schedule::Tile;
use crate::{Error, Output};

/// Carries the states of query rows over the keys of some tiles, in the order of the tiles.
///
/// - `q` `[tokens, q_heads, qk_dim]`, `k` `[keys, kv_heads, qk_dim]`, `v` `[keys, kv_heads, v_dim]`: the rows that the tiles name;
/// - `states` `[tokens, q_heads]`: continued, bit for bit the same where a row sees none of the keys.
///
/// # Errors
/// [`Error::Argument`] for a tile outside these rows, [`Error::Attention`] when shapes do not fit.
pub fn absorb<T: Element>(
    spec: &AttentionSpec,
    tiles: &[Tile],
    q: HeadsView<'_, f32>,
    k: HeadsView<'_, T>,
    v: HeadsView<'_, T>,
    states: &mut [Raw<f32>],
) -> Result<(), Error> {
    let heads = spec.shape.q_heads();
    crate::error::check_len("states", states.len(), &[q.tokens(), heads])?;
    for tile in tiles {
        for (argument, end, rows) in
            [("q", tile.q.end, q.tokens()), ("k", tile.kv.end, k.tokens()), ("v", tile.kv.end, v.tokens())]
        {
            if end > rows {
                return Err(Error::argument(argument, format!("rows of {tile:?}"), format!("{rows} rows")));
            }
        }
        attention::cpu::carry(
            spec,
            q.slice(tile.q.clone()),
            k.slice(tile.kv.clone()),
            v.slice(tile.kv.clone()),
            |i| tile.seen(&spec.mask, i),
            &mut states[tile.q.start * heads..tile.q.end * heads],
        )?;
    }
    Ok(())
}

/// Outputs and LSEs of states `[tokens, q_heads]`.
pub(crate) fn finish(states: &[Raw<f32>]) -> Output {
    let mut output = Output { out: Vec::new(), lse: Vec::new() };
    for state in states {
        let state = state.normalise();
        output.out.extend(state.out);
        output.lse.push(state.lse);
    }
    output
}
