//! Device memory shared out among requests.
//!
//! A request needs its **mandatory** pages, without which a step cannot run, and is quicker with **buffering** pages, which
//! keep what it used before. It is admitted if its floor fits: mandatory pages and the least buffering. When the pool is
//! short, everyone gives up what it has not used for longest: one age threshold for all requests, so that what is
//! dropped is what the whole machine misses least. No one falls below its floor.

use crate::Error;

/// Handle of an admitted request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// What a request holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Pages it never falls below.
    pub floor: usize,
    /// Pages it would like.
    pub wanted: usize,
    /// Pages it holds.
    pub held: usize,
}

impl Grant {
    /// Pages it can give up.
    pub fn spare(&self) -> usize {
        self.held - self.floor
    }
}

/// The pages of a device pool and who holds them.
#[derive(Debug, Clone)]
pub struct Budget {
    capacity: usize,
    held: usize,
    grants: Vec<Option<Grant>>,
    generations: Vec<u32>,
}

impl Budget {
    /// `capacity` pages, all free.
    pub fn new(capacity: usize) -> Self {
        Budget { capacity, held: 0, grants: Vec::new(), generations: Vec::new() }
    }

    /// Pages in all.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.capacity - self.held
    }

    /// Admitted requests and what they hold.
    pub fn grants(&self) -> impl Iterator<Item = (Ticket, Grant)> + '_ {
        (0u32..).zip(&self.grants).filter_map(|(index, grant)| {
            Some((Ticket { index, generation: self.generations[index as usize] }, (*grant)?))
        })
    }

    /// Pages that have to be [reclaimed](age_cut) before a request with this floor can be admitted.
    ///
    /// # Errors
    /// [`Error::Refused`] when all others together cannot spare them.
    pub fn shortfall(&self, floor: usize) -> Result<usize, Error> {
        let short = floor.saturating_sub(self.free());
        let spare: usize = self.grants.iter().flatten().map(Grant::spare).sum();
        if short > spare {
            return Err(Error::Refused {
                needed: floor,
                available: self.free() + spare,
                capacity: self.capacity,
            });
        }
        Ok(short)
    }

    /// Admits a request: it gets `wanted` pages, or what is free, but at least `floor`.
    ///
    /// # Errors
    /// [`Error::Refused`] when fewer than `floor` are free; nobody loses anything then.
    pub fn try_admit(&mut self, floor: usize, wanted: usize) -> Result<Ticket, Error> {
        if floor > self.free() {
            return Err(Error::Refused { needed: floor, available: self.free(), capacity: self.capacity });
        }
        let held = wanted.max(floor).min(self.free());
        self.held += held;
        let grant = Some(Grant { floor, wanted: wanted.max(floor), held });
        let index = match self.grants.iter().position(Option::is_none) {
            Some(index) => {
                self.grants[index] = grant;
                index
            }
            None => {
                self.grants.push(grant);
                self.generations.push(0);
                self.grants.len() - 1
            }
        };
        Ok(Ticket { index: index as u32, generation: self.generations[index] })
    }

    fn live(&mut self, ticket: Ticket) -> Result<&mut Grant, Error> {
        let index = ticket.index as usize;
        let stale = Error::StaleRequest { index: ticket.index, generation: ticket.generation };
        if self.generations.get(index) != Some(&ticket.generation) {
            return Err(stale);
        }
        self.grants[index].as_mut().ok_or(stale)
    }

    /// What a request holds.
    ///
    /// # Errors
    /// [`Error::StaleRequest`].
    pub fn grant(&self, ticket: Ticket) -> Result<Grant, Error> {
        self.grants()
            .find(|&(live, _)| live == ticket)
            .map(|(_, grant)| grant)
            .ok_or(Error::StaleRequest { index: ticket.index, generation: ticket.generation })
    }

    /// Takes pages from a request, as many as it can spare; gives how many.
    ///
    /// # Errors
    /// [`Error::StaleRequest`].
    pub fn shrink(&mut self, ticket: Ticket, pages: usize) -> Result<usize, Error> {
        let grant = self.live(ticket)?;
        let taken = pages.min(grant.spare());
        grant.held -= taken;
        self.held -= taken;
        Ok(taken)
    }

    /// Gives free pages to a request, up to what it wants; gives how many.
    ///
    /// # Errors
    /// [`Error::StaleRequest`].
    pub fn grow(&mut self, ticket: Ticket, pages: usize) -> Result<usize, Error> {
        let free = self.free();
        let grant = self.live(ticket)?;
        let given = pages.min(grant.wanted - grant.held).min(free);
        grant.held += given;
        self.held += given;
        Ok(given)
    }

    /// Takes back all pages of a request.
    ///
    /// # Errors
    /// [`Error::StaleRequest`].
    pub fn release(&mut self, ticket: Ticket) -> Result<(), Error> {
        let held = self.live(ticket)?.held;
        self.held -= held;
        self.grants[ticket.index as usize] = None;
        let generation = &mut self.generations[ticket.index as usize];
        *generation = generation.wrapping_add(1);
        Ok(())
    }
}

/// What someone could give up.
#[derive(Debug, Clone, Copy)]
pub struct Holding<'a> {
    /// Pages by age, as [`histogram`](crate::BucketedLru::histogram) gives them: the last entry is free slots, which go
    /// first.
    pub ages: &'a [usize],
    /// Pages that may go.
    pub spare: usize,
}

/// Who gives up how many pages, so that `needed` come together: all pages older than one threshold, and at the threshold as
/// many as are missing, in the order of the holdings. Gives the threshold and the pages of each holding; `None` when they
/// cannot spare enough.
pub fn age_cut(needed: usize, holdings: &[Holding<'_>]) -> Option<(usize, Vec<usize>)> {
    let buckets = holdings.iter().map(|holding| holding.ages.len()).max().unwrap_or(0);
    // Pages of age `threshold` or older that a holding can give.
    let older = |holding: &Holding<'_>, threshold: usize| {
        holding.ages.iter().skip(threshold).sum::<usize>().min(holding.spare)
    };
    for threshold in (0..=buckets).rev() {
        let all: usize = holdings.iter().map(|holding| older(holding, threshold)).sum();
        if all < needed {
            continue;
        }
        let mut drops: Vec<usize> = holdings.iter().map(|holding| older(holding, threshold + 1)).collect();
        let mut missing = needed - drops.iter().sum::<usize>().min(needed);
        for (drop, holding) in drops.iter_mut().zip(holdings) {
            let more = (older(holding, threshold) - *drop).min(missing);
            *drop += more;
            missing -= more;
        }
        return Some((threshold, drops));
    }
    None
}
