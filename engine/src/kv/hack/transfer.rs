//! A quantized cache on its way to another process: prefill here, decode there.

use std::io::{Read, Write};

use homomorphic_quant::Cache;
use homomorphic_quant::page::PageLayout;
use homomorphic_quant::wire::{Header, Model, Receiver, Sender};

use super::{Hack, QuantizedLayer};
use crate::Error;

impl Hack {
    /// Sizes that both sides must agree on. All layers of a model are alike.
    fn model(&self) -> Result<Model, Error> {
        let Some(first) = self.layers.first() else {
            return Err(Error::argument("cache", "at least 1 layer", 0));
        };
        let shape = first.parts().0.shape();
        Ok(Model {
            layers: self.layers.len() as u32,
            kv_heads: shape.kv_heads as u32,
            qk_dim: shape.qk_dim as u32,
            v_dim: shape.v_dim as u32,
        })
    }

    /// Writes everything held to a stream, named `tag`. Gives the bytes of keys and values among it.
    ///
    /// # Errors
    /// A writer that fails.
    pub fn send(&self, writer: impl Write, tag: u64) -> Result<usize, Error> {
        let model = self.model()?;
        let tokens = self.layers.first().map_or(0, QuantizedLayer::tokens) as u64;
        let config = self.layers[0].parts().0.config().clone();
        let header = Header { tag, tokens, model, config, page_layout: PageLayout::Canonical };
        let mut sender = Sender::new(writer, header)?;
        let mut bytes = 0;
        for layer in &self.layers {
            let (cache, sequence) = layer.parts();
            sender.layer(cache, sequence)?;
            bytes += cache.content_bytes(sequence.tokens());
        }
        sender.finish()?;
        Ok(bytes)
    }

    /// Takes what [`send`](Self::send) wrote, instead of what is held now.
    ///
    /// # Errors
    /// A stream of another model, configuration or tag, one that is damaged or cut, or one that is longer than the
    /// cache has room for. The cache is empty then.
    pub fn receive(&mut self, reader: impl Read, tag: u64, max_tokens: usize) -> Result<(), Error> {
        let model = self.model()?;
        self.layers.iter_mut().for_each(QuantizedLayer::clear);
        let mut caches: Vec<&mut Cache> = self.layers.iter_mut().map(|layer| layer.parts_mut().0).collect();
        let mut receiver = Receiver::new(tag, model, &caches, max_tokens)?;
        let result = receiver.receive(reader, &mut caches);
        match (result, receiver.finish()) {
            (Ok(true), Ok(sequences)) => {
                for (layer, sequence) in self.layers.iter_mut().zip(sequences) {
                    *layer.parts_mut().1 = sequence;
                }
                Ok(())
            }
            (result, received) => {
                match received {
                    // Every segment came, but not the end of the stream, which vouches for them.
                    Ok(sequences) => {
                        for (cache, sequence) in caches.iter_mut().zip(sequences) {
                            cache.release(sequence)?;
                        }
                    }
                    Err(receiver) => receiver.abort(&mut caches)?,
                }
                result?;
                Err(Error::argument("stream", "every layer and KV head", "fewer"))
            }
        }
    }
}
