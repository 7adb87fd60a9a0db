//! Paged KV caches: views over pages, block tables and lengths.
//!
//! Shapes are checked when a view is made. Lengths and page ids live in device memory on a GPU, so they are checked row by
//! row when attention runs, and a bad row becomes a [`Fault`].

use crate::{Error, Fault, FaultCode, HeadShape, KeyValue, KeyValues};

/// Where the vectors of a page store lie: element `page · page_stride + slot · token_stride + head · head_stride`.
///
/// Strides are in elements; offsets are 64-bit. Keys and values that share a page take one layout each, over slices that
/// start at their first key and their first value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLayout {
    /// Elements from page to page.
    pub page_stride: u64,
    /// Elements from token to token.
    pub token_stride: u64,
    /// Elements from head to head.
    pub head_stride: u64,
}

impl PageLayout {
    /// `[pages, page_size, heads, dim]`.
    pub const fn nhd(page_size: usize, heads: usize, dim: usize) -> Self {
        let (page_size, heads, dim) = (page_size as u64, heads as u64, dim as u64);
        PageLayout { page_stride: page_size * heads * dim, token_stride: heads * dim, head_stride: dim }
    }

    /// `[pages, heads, page_size, dim]`.
    pub const fn hnd(page_size: usize, heads: usize, dim: usize) -> Self {
        let (page_size, heads, dim) = (page_size as u64, heads as u64, dim as u64);
        PageLayout { page_stride: page_size * heads * dim, token_stride: dim, head_stride: page_size * dim }
    }

    /// Element at which a vector starts, if it fits 64 bits.
    pub fn offset(&self, page: u64, slot: u64, head: u64) -> Option<u64> {
        let page = page.checked_mul(self.page_stride)?;
        let slot = slot.checked_mul(self.token_stride)?;
        page.checked_add(slot)?.checked_add(head.checked_mul(self.head_stride)?)
    }
}

/// Pages of keys or of values.
#[derive(Debug, Clone, Copy)]
pub struct PageStore<'a, T> {
    data: &'a [T],
    pages: usize,
    page_size: usize,
    heads: usize,
    dim: usize,
    layout: PageLayout,
}

impl<'a, T> PageStore<'a, T> {
    /// `pages` pages of `page_size` tokens of `heads` vectors `[dim]`, at the strides of `layout`.
    ///
    /// `heads` is the number of KV heads, or 1 when every page belongs to one KV head (the block table must then have rows
    /// per KV head).
    ///
    /// # Errors
    /// [`Error::Argument`] when `page_size`, `heads` or `dim` is 0, or a vector would end past `data`.
    pub fn new(
        data: &'a [T],
        pages: usize,
        page_size: usize,
        heads: usize,
        dim: usize,
        layout: PageLayout,
    ) -> Result<Self, Error> {
        for (argument, value) in [("page_size", page_size), ("heads", heads), ("dim", dim)] {
            if value == 0 {
                return Err(Error::argument(argument, "at least 1", 0));
            }
        }
        if pages > 0 {
            let last = layout.offset(pages as u64 - 1, page_size as u64 - 1, heads as u64 - 1);
            let end = last.and_then(|last| last.checked_add(dim as u64));
            if end.is_none_or(|end| end > data.len() as u64) {
                let needed = end.map_or("more than 2^64".to_string(), |end| end.to_string());
                return Err(Error::argument(
                    "pages",
                    format!("at least {needed} elements for {pages} pages at {layout:?}"),
                    format!("{} elements", data.len()),
                ));
            }
        }
        Ok(PageStore { data, pages, page_size, heads, dim, layout })
    }

    /// The vector of a slot of a page `[dim]`; `None` when page, slot or head is out of range.
    pub fn vector(&self, page: usize, slot: usize, head: usize) -> Option<&'a [T]> {
        if page >= self.pages || slot >= self.page_size || head >= self.heads {
            return None;
        }
        let start = self.layout.offset(page as u64, slot as u64, head as u64)? as usize;
        self.data.get(start..start + self.dim)
    }
}

/// Page ids of every sequence.
#[derive(Debug, Clone, Copy)]
pub struct BlockTable<'a> {
    ids: &'a [u32],
    /// 1 when all KV heads share a row.
    heads: usize,
    batch: usize,
    max_pages: usize,
}

impl<'a> BlockTable<'a> {
    /// `ids` `[batch, max_pages]`: all KV heads of a sequence use the same pages. Ids past a sequence's length are not
    /// read.
    ///
    /// # Errors
    /// [`Error::Argument`] when the length differs.
    pub fn shared(ids: &'a [u32], batch: usize, max_pages: usize) -> Result<Self, Error> {
        crate::error::check_len("block_table", ids.len(), &[batch, max_pages])?;
        Ok(BlockTable { ids, heads: 1, batch, max_pages })
    }

    /// `ids` `[kv_heads, batch, max_pages]`: every KV head has its own pages, as when each head selects its own.
    ///
    /// # Errors
    /// [`Error::Argument`] when the length differs or `kv_heads` is 0.
    pub fn per_head(ids: &'a [u32], kv_heads: usize, batch: usize, max_pages: usize) -> Result<Self, Error> {
        if kv_heads == 0 {
            return Err(Error::argument("kv_heads", "at least 1", 0));
        }
        crate::error::check_len("block_table", ids.len(), &[kv_heads, batch, max_pages])?;
        Ok(BlockTable { ids, heads: kv_heads, batch, max_pages })
    }

    /// Rows of the table: `batch`, or `kv_heads · batch`.
    pub const fn rows(&self) -> usize {
        self.heads * self.batch
    }

    /// Sequences.
    pub const fn batch(&self) -> usize {
        self.batch
    }

    /// Pages that a row has room for.
    pub const fn max_pages(&self) -> usize {
        self.max_pages
    }

    /// The row that a KV head reads for a sequence: `sequence`, or `kv_head · batch + sequence`.
    pub const fn row(&self, sequence: usize, kv_head: usize) -> usize {
        if self.heads == 1 { sequence } else { kv_head * self.batch + sequence }
    }

    /// Page ids of a row `[max_pages]`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn ids(&self, row: usize) -> &'a [u32] {
        &self.ids[row * self.max_pages..(row + 1) * self.max_pages]
    }
}

/// How many tokens the rows of a block table hold.
#[derive(Debug, Clone, Copy)]
pub enum PagedLengths<'a> {
    /// Tokens of each row `[rows]`: token `t` is slot `t % page_size` of page `t / page_size`.
    Tokens(&'a [u32]),
    /// Pages of each row, and the tokens at the front of each page that count: pages of clusters or selections, of which
    /// any may be short, even empty. Tokens are numbered in the order of the table.
    Pages {
        /// Pages in use `[rows]`.
        counts: &'a [u32],
        /// Valid tokens of each page `[rows, max_pages]`, at most the page size.
        valid: &'a [u32],
    },
}

/// A paged KV cache.
#[derive(Debug, Clone, Copy)]
pub struct PagedKv<'a, T> {
    k: PageStore<'a, T>,
    v: PageStore<'a, T>,
    table: BlockTable<'a>,
    lengths: PagedLengths<'a>,
}

impl<'a, T> PagedKv<'a, T> {
    /// Keys and values that share page ids.
    ///
    /// # Errors
    /// [`Error::Argument`] when page counts, page sizes or heads differ between `k` and `v`, the lengths have not one
    /// element per row (or page), or pages of one head come with a table that heads share.
    pub fn new(
        k: PageStore<'a, T>,
        v: PageStore<'a, T>,
        table: BlockTable<'a>,
        lengths: PagedLengths<'a>,
    ) -> Result<Self, Error> {
        let describe = |s: &PageStore<'_, T>| {
            format!("{} pages of {} tokens of {} heads", s.pages, s.page_size, s.heads)
        };
        if (k.pages, k.page_size, k.heads) != (v.pages, v.page_size, v.heads) {
            return Err(Error::argument("v", describe(&k), describe(&v)));
        }
        match lengths {
            PagedLengths::Tokens(tokens) => {
                crate::error::check_len("lengths", tokens.len(), &[table.rows()])?;
            }
            PagedLengths::Pages { counts, valid } => {
                crate::error::check_len("counts", counts.len(), &[table.rows()])?;
                crate::error::check_len("valid", valid.len(), &[table.rows(), table.max_pages()])?;
            }
        }
        Ok(PagedKv { k, v, table, lengths })
    }

    /// Pages of a row in use and the valid tokens of each.
    fn pages(&self, row: usize) -> Result<Vec<(u32, usize)>, Fault> {
        let bad_length = Fault { code: FaultCode::BadLength, index: row as u64 };
        let ids = self.table.ids(row);
        let page_size = self.k.page_size;
        let pages: Vec<(u32, usize)> = match self.lengths {
            PagedLengths::Tokens(tokens) => {
                let tokens = tokens[row] as usize;
                let count = tokens.div_ceil(page_size);
                if count > ids.len() {
                    return Err(bad_length);
                }
                let valid = |page: usize| page_size.min(tokens - page * page_size);
                (0..count).map(|page| (ids[page], valid(page))).collect()
            }
            PagedLengths::Pages { counts, valid } => {
                let count = counts[row] as usize;
                if count > ids.len() {
                    return Err(bad_length);
                }
                let valid = &valid[row * self.table.max_pages..][..count];
                if valid.iter().any(|&tokens| tokens as usize > page_size) {
                    return Err(bad_length);
                }
                ids.iter().zip(valid).map(|(&id, &tokens)| (id, tokens as usize)).collect()
            }
        };
        if pages.iter().any(|&(id, _)| id as usize >= self.k.pages) {
            return Err(Fault { code: FaultCode::BadPage, index: row as u64 });
        }
        Ok(pages)
    }
}

impl<T: Sync> KeyValues<T> for PagedKv<'_, T> {
    fn sequences(&self) -> usize {
        self.table.batch
    }

    fn check(&self, shape: &HeadShape) -> Result<(), Error> {
        let table_heads = self.table.heads;
        if table_heads != 1 && table_heads != shape.kv_heads() {
            return Err(Error::argument(
                "block_table",
                format!("{} KV heads", shape.kv_heads()),
                table_heads,
            ));
        }
        let heads_fit = self.k.heads == shape.kv_heads() || (self.k.heads == 1 && table_heads != 1);
        if !heads_fit {
            return Err(Error::argument(
                "pages",
                format!("{} KV heads, or 1 with a table per KV head", shape.kv_heads()),
                self.k.heads,
            ));
        }
        for (argument, expected, found) in
            [("k", shape.qk_dim(), self.k.dim), ("v", shape.v_dim(), self.v.dim)]
        {
            if expected != found {
                return Err(Error::argument(argument, format!("vectors of {expected}"), found));
            }
        }
        Ok(())
    }

    fn tokens(&self, sequence: usize, kv_head: usize) -> Result<Vec<KeyValue<'_, T>>, Fault> {
        let row = self.table.row(sequence, kv_head);
        let head = if self.k.heads == 1 { 0 } else { kv_head };
        let out_of_pages = Fault { code: FaultCode::BadPage, index: row as u64 };
        let mut tokens = Vec::new();
        for (page, valid) in self.pages(row)? {
            for slot in 0..valid {
                let key = self.k.vector(page as usize, slot, head).ok_or(out_of_pages)?;
                let value = self.v.vector(page as usize, slot, head).ok_or(out_of_pages)?;
                tokens.push(KeyValue { key, value });
            }
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_do_not_wrap() {
        // 2^20 pages of 64 tokens of 8 heads of 128: past 2^36 elements.
        let layout = PageLayout::nhd(64, 8, 128);
        assert_eq!(layout.offset(1 << 20, 63, 7), Some((1 << 36) + 63 * 1024 + 7 * 128));
        let layout = PageLayout::hnd(64, 8, 128);
        assert_eq!(layout.offset(1 << 20, 63, 7), Some((1 << 36) + 63 * 128 + 7 * 64 * 128));
        assert_eq!(layout.offset(u64::MAX, 0, 0), None);
        let data = [0f32; 8];
        assert!(PageStore::new(&data, 1 << 40, 64, 8, 128, layout).is_err());
        assert!(PageStore::new(&data, usize::MAX, usize::MAX, 1, 1, PageLayout::nhd(1, 1, 8)).is_err());
    }

    #[test]
    fn layouts_and_interleaved_keys_and_values() {
        // [pages, heads, 2, page_size, dim]: keys and values of a head side by side, as a host page is.
        let (pages, heads, page_size, dim) = (3, 2, 4, 2);
        let data: Vec<u32> = (0..(pages * heads * 2 * page_size * dim) as u32).collect();
        let layout = PageLayout {
            page_stride: (heads * 2 * page_size * dim) as u64,
            token_stride: dim as u64,
            head_stride: (2 * page_size * dim) as u64,
        };
        let k = PageStore::new(&data, pages, page_size, heads, dim, layout).unwrap();
        let v = PageStore::new(&data[page_size * dim..], pages, page_size, heads, dim, layout).unwrap();
        assert_eq!(k.vector(2, 3, 1), Some(&[2 * 32 + 16 + 6, 2 * 32 + 16 + 7][..]));
        assert_eq!(v.vector(2, 3, 1), Some(&[2 * 32 + 16 + 8 + 6, 2 * 32 + 16 + 8 + 7][..]));
        assert_eq!(v.vector(3, 0, 0), None);
        let table = [2, 0];
        let lengths = [5];
        let kv =
            PagedKv::new(k, v, BlockTable::shared(&table, 1, 2).unwrap(), PagedLengths::Tokens(&lengths))
                .unwrap();
        let tokens = kv.tokens(0, 1).unwrap();
        assert_eq!(tokens.len(), 5);
        assert_eq!(tokens[4], KeyValue { key: &data[16..18], value: &data[24..26] });
    }

    #[test]
    fn bad_rows_are_faults_and_unread_ids_are_not() {
        let data = [0f32; 2 * 4];
        let store = PageStore::new(&data, 2, 4, 1, 1, PageLayout::nhd(4, 1, 1)).unwrap();
        let table = [0, 1, 1, 9, 9, 9];
        let table = BlockTable::shared(&table, 3, 2).unwrap();
        type Found = [Result<usize, Fault>; 3];
        fn lens(kv: PagedKv<'_, f32>) -> Found {
            [0, 1, 2].map(|b| kv.tokens(b, 0).map(|tokens| tokens.len()))
        }
        let fault = |code, index| Err(Fault { code, index });
        let cases: [(&str, [u32; 3], Found); 3] = [
            ("ids past the length are not read", [8, 4, 0], [Ok(8), Ok(4), Ok(0)]),
            ("bad page", [1, 5, 1], [Ok(1), fault(FaultCode::BadPage, 1), fault(FaultCode::BadPage, 2)]),
            (
                "bad length",
                [9, u32::MAX, 0],
                [fault(FaultCode::BadLength, 0), fault(FaultCode::BadLength, 1), Ok(0)],
            ),
        ];
        for (case, lengths, expected) in cases {
            let found = lens(PagedKv::new(store, store, table, PagedLengths::Tokens(&lengths)).unwrap());
            assert_eq!(found, expected, "{case}");
        }
        let pages = |counts: &'static [u32; 3], valid: &'static [u32; 6]| {
            lens(PagedKv::new(store, store, table, PagedLengths::Pages { counts, valid }).unwrap())
        };
        assert_eq!(pages(&[2, 1, 0], &[1, 4, 3, 99, 99, 99]), [Ok(5), Ok(3), Ok(0)], "short pages anywhere");
        assert_eq!(
            pages(&[2, 3, 1], &[5, 4, 3, 1, 1, 1]),
            [fault(FaultCode::BadLength, 0), fault(FaultCode::BadLength, 1), fault(FaultCode::BadPage, 2)]
        );
    }

    #[test]
    fn constructors_refuse_what_does_not_fit() {
        let data = [0f32; 32];
        let store =
            |heads, dim| PageStore::new(&data, 2, 4, heads, dim, PageLayout::nhd(4, heads, dim)).unwrap();
        let ids = [0u32; 4];
        let lengths = [0u32; 2];
        let shape = HeadShape::new(4, 2, 2, 1).unwrap();
        let shared = BlockTable::shared(&ids, 2, 2).unwrap();
        let per_head = BlockTable::per_head(&ids, 2, 1, 2).unwrap();
        let tokens = PagedLengths::Tokens(&lengths);
        let argument = |result: Result<(), Error>| match result {
            Err(Error::Argument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        let made = |k, v, table, lengths| PagedKv::new(k, v, table, lengths).map(|_| ());
        assert_eq!(argument(made(store(2, 2), store(1, 2), shared, tokens)), "v");
        assert_eq!(argument(made(store(2, 2), store(2, 1), shared, PagedLengths::Tokens(&ids))), "lengths");
        let pages = PagedLengths::Pages { counts: &lengths, valid: &lengths };
        assert_eq!(argument(made(store(2, 2), store(2, 1), shared, pages)), "valid");
        let check = |k, v, table| PagedKv::new(k, v, table, tokens).unwrap().check(&shape);
        assert!(check(store(2, 2), store(2, 1), shared).is_ok());
        assert!(check(store(1, 2), store(1, 1), per_head).is_ok(), "pages of one head each");
        assert_eq!(argument(check(store(1, 2), store(1, 1), shared)), "pages");
        assert_eq!(argument(check(store(2, 1), store(2, 1), shared)), "k");
        assert_eq!(argument(check(store(2, 2), store(2, 2), shared)), "v");
        assert!(BlockTable::shared(&ids, 3, 2).is_err());
        assert!(BlockTable::per_head(&ids, 0, 2, 2).is_err());
        for (pages, page_size, heads, dim) in [(2, 0, 1, 1), (2, 1, 0, 1), (2, 1, 1, 0), (5, 4, 2, 1)] {
            let layout = PageLayout::hnd(page_size, heads, dim);
            assert!(PageStore::new(&data, pages, page_size, heads, dim, layout).is_err());
        }
    }
}
