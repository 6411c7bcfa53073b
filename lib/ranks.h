// lib/ranks.h - the ranks of an MPI job, or one if there is none
//
//   my_rank, all_ranks            who we are
//   ranks_begin(), ranks_finish() only rank 0 speaks; a rank that fails ends the job
//   ranks_sum(), ranks_share()    sums over the ranks; what one has for all
//   ranks_add()                   a sum of parts that travels from rank to rank

#ifdef MB_MPI  // all that knows of MPI; without it there is one rank
#include <mpi.h>

enum { PIECE = 1 << 18, MOST_PIECES = 1 << 12 };  // floats
static int my_rank, all_ranks = 1, ranks_done, rank_stderr;
static MPI_Request piece_request[MOST_PIECES];
static int pieces_sent;

// At exit. A rank that fails ends the job, with one message: that of rank 0 if it fails too.
static void ranks_end(void) {
    char text[4096] = "", *line = text;
    if (ranks_done) {
        MPI_Finalize();
        return;
    }
    if (my_rank > 0) {
        sleep(1);
        fflush(stderr);
        off_t size = lseek(2, 0, SEEK_END), most = sizeof text - 1;
        lseek(2, size > most ? size - most : 0, SEEK_SET);
        ssize_t n = read(2, text, sizeof text - 1);
        for (ssize_t k = 0; k + 1 < n; k++) line = text[k] == '\n' ? text + k + 1 : line;
        dprintf(rank_stderr, "rank %d: %s", my_rank, line);
    }
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
}

// Only rank 0 speaks; what the others would say goes to a file without name.
static void ranks_begin(void) {
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &my_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &all_ranks);
    atexit(ranks_end);
    if (my_rank == 0) return;
    FILE *nowhere = tmpfile();
    rank_stderr = dup(2);
    CHECK(nowhere && dup2(fileno(nowhere), 1) >= 0 && dup2(fileno(nowhere), 2) >= 0,
          "cannot open a temporary file: %s", strerror(errno));
}

// The program ends well.
static void ranks_finish(void) { ranks_done = 1; }

// x = its sum over the ranks, of n float or double: of whole numbers, or of numbers that all ranks
// but one leave 0, which is exact in any order.
static void ranks_sum(void *x, size_t n, size_t size) {
    for (size_t k = 0; k < n; k += PIECE)
        MPI_Allreduce(MPI_IN_PLACE, (char *)x + k * size, (int)min_size(n - k, PIECE),
                      size == sizeof(float) ? MPI_FLOAT : MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

// Receives a piece of the sum up to part k - 1.
static void piece_receive(float *sum, size_t n, size_t k) {
    MPI_Recv(sum, (int)n, MPI_FLOAT, (int)((k - 1) % (size_t)all_ranks), 0, MPI_COMM_WORLD,
             MPI_STATUS_IGNORE);
}

// Begins to send a piece of the sum up to part k.
static void piece_send(const float *sum, size_t n, size_t k) {
    CHECK(pieces_sent < MOST_PIECES, "a model too large for MOST_PIECES");
    MPI_Isend(sum, (int)n, MPI_FLOAT, (int)((k + 1) % (size_t)all_ranks), 0, MPI_COMM_WORLD,
              &piece_request[pieces_sent++]);
}

// Waits until all of them have left.
static void pieces_wait(void) {
    MPI_Waitall(pieces_sent, piece_request, MPI_STATUSES_IGNORE);
    pieces_sent = 0;
}

// All ranks get what the one of the last part has.
static void ranks_share(float *x, size_t n, size_t last) {
    for (size_t k = 0; k < n && all_ranks > 1; k += PIECE)
        MPI_Bcast(x + k, (int)min_size(n - k, PIECE), MPI_FLOAT, (int)(last % (size_t)all_ranks),
                  MPI_COMM_WORLD);
}
#else
enum { PIECE = 1 << 18, my_rank = 0, all_ranks = 1 };
static void ranks_sum(void *x, size_t n, size_t size) { (void)x, (void)n, (void)size; }
static void piece_receive(float *sum, size_t n, size_t k) { (void)sum, (void)n, (void)k; }
static void piece_send(const float *sum, size_t n, size_t k) { (void)sum, (void)n, (void)k; }
static void pieces_wait(void) {}
static inline void ranks_begin(void) {}
static inline void ranks_finish(void) {}
static void ranks_share(float *x, size_t n, size_t last) { (void)x, (void)n, (void)last; }
#endif

// Adds the gradients x (n) of part k to the sum, which comes from the rank of part k - 1; after the
// last part x is the sum. It travels in pieces, so that all ranks add at once.
static void ranks_add(float *sum, float *x, idx n, idx k, idx parts) {
    pieces_wait();
    for (idx first = 0; first < n; first += PIECE) {
        idx end = min_idx(first + PIECE, n), size = end - first;
        if (k > 0 && all_ranks > 1) piece_receive(sum + first, size, k);
#pragma omp parallel for simd schedule(static)
        for (idx i = first; i < end; i++) sum[i] = k > 0 ? sum[i] + x[i] : x[i];
        if (k + 1 == parts) memcpy(x + first, sum + first, size * sizeof *x);
        else if (all_ranks > 1) piece_send(sum + first, size, k);
    }
}
