//! The MPI calls that the transport is made of, with their errors; its other `unsafe` is in `transport.rs`, where blocks are posted and freed.
//!
//! rsmpi's own requests borrow their buffers, so they cannot be kept in a map beside them; these are its raw bindings.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use mpi::environment::Universe;
use mpi::ffi;
use mpi::{Threading, initialize_with_threading};
use seq_parallel::Error;

/// Why a call did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failed {
    call: &'static str,
    code: c_int,
}

impl Failed {
    /// Whether a message was longer than the buffer that it came into.
    pub(crate) fn is_truncation(&self) -> bool {
        let mut class = 0;
        // SAFETY: MPI is initialised, as a call has failed; the class is written to an integer of this frame.
        let code = unsafe { ffi::MPI_Error_class(self.code, &mut class) };
        code == SUCCESS && class == ffi::MPI_ERR_TRUNCATE as c_int
    }

    /// What the library says of it.
    pub(crate) fn message(&self) -> String {
        let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize];
        let mut len = 0;
        // SAFETY: MPI is initialised, as a call has failed; the buffer has the length that the standard asks for.
        let code = unsafe { ffi::MPI_Error_string(self.code, text.as_mut_ptr().cast(), &mut len) };
        text.truncate(if code == SUCCESS { len.max(0) as usize } else { 0 });
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        let message = failed.message();
        Error::Library { library: "MPI", call: failed.call, code: failed.code.into(), message }
    }
}

const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

fn check(call: &'static str, code: c_int) -> Result<(), Failed> {
    if code == SUCCESS { Ok(()) } else { Err(Failed { call, code }) }
}

/// Initialises MPI for calls from one thread at a time, whichever.
pub(crate) fn initialise() -> Result<Universe, Error> {
    let library =
        |message: String| Error::Library { library: "MPI", call: "MPI_Init_thread", code: 0, message };
    let (universe, level) = initialize_with_threading(Threading::Serialized)
        .ok_or_else(|| library("MPI is initialised already; a process has one end".into()))?;
    if level < Threading::Serialized {
        return Err(library(format!("{level:?} threading is all that this MPI has; Serialized is needed")));
    }
    Ok(universe)
}

/// A communicator of all processes whose errors are returned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Comm(ffi::MPI_Comm);

// SAFETY: MPI was initialised for calls from any thread, one at a time, and a `Comm` is only reached through the one `Mpi`.
unsafe impl Send for Comm {}

impl Comm {
    /// A copy of the world, whose messages mix with nobody else's.
    pub(crate) fn of_world() -> Result<Self, Failed> {
        let mut comm = MaybeUninit::uninit();
        // SAFETY: a constant of the library, set before main.
        let world = unsafe { ffi::RSMPI_COMM_WORLD };
        // SAFETY: MPI is initialised (`initialise` came before); the handle is written to this frame.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(world, comm.as_mut_ptr()) })?;
        // SAFETY: the call has succeeded, so it has written the handle.
        let comm = unsafe { comm.assume_init() };
        // SAFETY: a constant of the library, set before main.
        let errors_return = unsafe { ffi::RSMPI_ERRORS_RETURN };
        // SAFETY: both handles are valid.
        check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(comm, errors_return) })?;
        Ok(Comm(comm))
    }

    /// This process and how many there are.
    pub(crate) fn place(self) -> Result<(usize, usize), Failed> {
        let (mut rank, mut ranks) = (0, 0);
        // SAFETY: the communicator is valid, and the number is written to this frame.
        check("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(self.0, &mut rank) })?;
        // SAFETY: as above.
        check("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(self.0, &mut ranks) })?;
        Ok((rank as usize, ranks as usize))
    }

    /// Sends `words` to every process and gives what every process sent. Blocks, with no deadline: for the set-up, which MPI_Init is
    /// part of too. Afterwards every pair of processes has spoken, so that no connection has to be made when one of them is in trouble.
    pub(crate) fn introduce<const N: usize>(
        self,
        words: [u64; N],
        ranks: usize,
    ) -> Result<Vec<[u64; N]>, Failed> {
        let send = vec![words; ranks];
        let mut all = vec![[0; N]; ranks];
        // SAFETY: a constant of the library, set before main.
        let word = unsafe { ffi::RSMPI_UINT64_T };
        let (from, to) = (send.as_ptr().cast::<c_void>(), all.as_mut_ptr().cast::<c_void>());
        // SAFETY: both arrays have N words for each of the processes, live past this blocking call, and do not overlap.
        let code = unsafe { ffi::MPI_Alltoall(from, N as c_int, word, to, N as c_int, word, self.0) };
        check("MPI_Alltoall", code)?;
        Ok(all)
    }

    /// Starts sending words, which is done as soon as they are on their way: whether anybody asks for them or not, where they are few.
    ///
    /// # Safety
    /// The words stay where they are and unchanged until [`Request::test`] has said that the request is done, or for ever.
    pub(crate) unsafe fn send(self, words: &[u64], to: usize, tag: i32) -> Result<Request, Failed> {
        // SAFETY: as the caller says; the function is MPI's.
        unsafe { self.start_sending("MPI_Isend", ffi::MPI_Isend, words, to, tag) }
    }

    /// As [`send`](Self::send), but done only when the receiver has asked for them.
    ///
    /// # Safety
    /// As [`send`](Self::send).
    pub(crate) unsafe fn send_to_receiver(
        self,
        words: &[u64],
        to: usize,
        tag: i32,
    ) -> Result<Request, Failed> {
        // SAFETY: as the caller says; the function is MPI's.
        unsafe { self.start_sending("MPI_Issend", ffi::MPI_Issend, words, to, tag) }
    }

    /// # Safety
    /// As [`send`](Self::send); the function is one of MPI's nonblocking sends.
    unsafe fn start_sending(
        self,
        call: &'static str,
        function: Sends,
        words: &[u64],
        to: usize,
        tag: i32,
    ) -> Result<Request, Failed> {
        let mut request = MaybeUninit::uninit();
        // SAFETY: a constant of the library, set before main.
        let word = unsafe { ffi::RSMPI_UINT64_T };
        let (buffer, count) = (words.as_ptr().cast(), count(words)?);
        // SAFETY: the buffer has `count` words and stays, as the caller says; the request is written to this frame.
        let code = unsafe { function(buffer, count, word, to as c_int, tag, self.0, request.as_mut_ptr()) };
        check(call, code)?;
        // SAFETY: the call has succeeded, so it has written the request.
        Ok(Request(unsafe { request.assume_init() }))
    }

    /// Starts receiving words.
    ///
    /// # Safety
    /// The words stay where they are and nobody else reaches them until [`Request::test`] has said that the request is done, or for ever.
    pub(crate) unsafe fn receive(self, words: &mut [u64], from: usize, tag: i32) -> Result<Request, Failed> {
        let mut request = MaybeUninit::uninit();
        // SAFETY: a constant of the library, set before main.
        let word = unsafe { ffi::RSMPI_UINT64_T };
        let (buffer, count) = (words.as_mut_ptr().cast(), count(words)?);
        // SAFETY: the buffer has `count` words and stays, as the caller says; the request is written to this frame.
        let code =
            unsafe { ffi::MPI_Irecv(buffer, count, word, from as c_int, tag, self.0, request.as_mut_ptr()) };
        check("MPI_Irecv", code)?;
        // SAFETY: the call has succeeded, so it has written the request.
        Ok(Request(unsafe { request.assume_init() }))
    }

    /// Takes a short message of `N` words that is here already, from anybody.
    pub(crate) fn take<const N: usize>(self, tag: i32) -> Result<Option<[u64; N]>, Failed> {
        let (mut here, mut status) = (0, MaybeUninit::<ffi::MPI_Status>::uninit());
        // SAFETY: a constant of the library, set before main.
        let any = unsafe { ffi::RSMPI_ANY_SOURCE };
        // SAFETY: the communicator is valid, and both results are written to this frame.
        let code = unsafe { ffi::MPI_Iprobe(any, tag, self.0, &mut here, status.as_mut_ptr()) };
        check("MPI_Iprobe", code)?;
        if here == 0 {
            return Ok(None);
        }
        // SAFETY: the probe has found a message, so it has written the status.
        let from = unsafe { status.assume_init() }.MPI_SOURCE;
        let mut words = [0u64; N];
        // SAFETY: a constant of the library, set before main.
        let word = unsafe { ffi::RSMPI_UINT64_T };
        // SAFETY: likewise.
        let ignore = unsafe { ffi::RSMPI_STATUS_IGNORE };
        // SAFETY: the array has N words and lives past this call, which has its message already.
        let code =
            unsafe { ffi::MPI_Recv(words.as_mut_ptr().cast(), N as c_int, word, from, tag, self.0, ignore) };
        check("MPI_Recv", code)?;
        Ok(Some(words))
    }
}

/// A nonblocking send of MPI.
type Sends = unsafe extern "C" fn(
    *const c_void,
    c_int,
    ffi::MPI_Datatype,
    c_int,
    c_int,
    ffi::MPI_Comm,
    *mut ffi::MPI_Request,
) -> c_int;

fn count(words: &[u64]) -> Result<c_int, Failed> {
    // 16 GiB less one word: nobody passes longer blocks, and the library would say the same of a negative count.
    c_int::try_from(words.len()).map_err(|_| Failed { call: "a message", code: ffi::MPI_ERR_COUNT as c_int })
}

/// Something under way. Dropping it leaves it under way.
#[derive(Debug)]
pub(crate) struct Request(ffi::MPI_Request);

// SAFETY: as for `Comm`.
unsafe impl Send for Request {}

impl Request {
    /// Whether it is done; and then the words that came, where it was a receive.
    pub(crate) fn test(&mut self) -> Result<Option<usize>, Failed> {
        let (mut done, mut status) = (0, MaybeUninit::<ffi::MPI_Status>::uninit());
        // SAFETY: the request is one that MPI has written, or its null, which is always done; results go to this frame.
        let code = unsafe { ffi::MPI_Test(&mut self.0, &mut done, status.as_mut_ptr()) };
        check("MPI_Test", code)?;
        if done == 0 {
            return Ok(None);
        }
        let mut words = 0;
        // SAFETY: a constant of the library, set before main.
        let word = unsafe { ffi::RSMPI_UINT64_T };
        // SAFETY: the test was done, so it has written the status. That of a send has an undefined count, which nobody reads.
        let code = unsafe { ffi::MPI_Get_count(status.as_ptr(), word, &mut words) };
        check("MPI_Get_count", code)?;
        Ok(Some(words.max(0) as usize))
    }
}
