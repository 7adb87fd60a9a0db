// Stands before MPI: a call of this rank fails, or hangs, once a file of its name and the rank is in the test's folder.
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int told(const char* call) {
    const char *folder = getenv("SEQ_PARALLEL_MPI_TEST"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    char path[4096];
    if (!folder || !rank) return 0;
    snprintf(path, sizeof path, "%s/%s.%s", folder, call, rank);
    return access(path, F_OK) == 0;
}

int MPI_Irecv(void* memory, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm, MPI_Request* request) {
    if (told("MPI_Irecv")) return MPI_ERR_OTHER;
    return PMPI_Irecv(memory, count, type, from, tag, comm, request);
}

int MPI_Iprobe(int from, int tag, MPI_Comm comm, int* here, MPI_Status* status) {
    if (told("MPI_Iprobe")) return MPI_ERR_OTHER;
    return PMPI_Iprobe(from, tag, comm, here, status);
}

int MPI_Test(MPI_Request* request, int* done, MPI_Status* status) {
    while (told("MPI_Test")) usleep(1000);
    return PMPI_Test(request, done, status);
}
