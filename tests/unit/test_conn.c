/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* conn: negotiation, reading and endings over a real socket: the bytes, and what the VM is told at the end of a stay.
 */
#include "conn_world.h"

/* -- negotiation --------------------------------------------------------------------------------------------------- */
static void disks_of_all_vms_are_listed(void **state)
{
    struct world *w = *state;
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};

    w->catalog.nvms = 2;
    say_option(&b, NBD_OPT_LIST, NULL);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len > 0);
    loop_turn(&w->loop, 3);
    put8(&c->in, 0);
    assert_non_null(memmem(c->in.data, c->in.len, "web/vda", 7));
    assert_non_null(memmem(c->in.data, c->in.len, "web/vdb", 7));
    assert_non_null(memmem(c->in.data, c->in.len, "db/vda", 6));
    assert_non_null(memmem(c->in.data, c->in.len, "8 MiB, 1 usable checkpoint", 26));
    assert_int_equal(w->vms[0].nentered, 0); /* nothing is frozen for it */
}

static void expect_refusal(struct world *w, const char *name, const char *part)
{
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};

    say_info(&b, NBD_OPT_GO, name, 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len > NBD_OPTION_REPLY_SIZE);
    put8(&b, 0x80); /* all errors have this bit */
    assert_memory_equal(c->in.data + 12, b.data, 1);
    bytes_done(&b);
    if (!memmem(c->in.data, c->in.len, part, strlen(part)))
        fail_msg("\"%s\" is not in \"%.*s\"", part, (int)(c->in.len - NBD_OPTION_REPLY_SIZE),
                 (char *)c->in.data + NBD_OPTION_REPLY_SIZE);
    bytes_done(&c->in);
    client_close(c);
    loop_until(&w->loop, w->set.nopen == 0);
    *c = (struct client){0};
}

static void names_that_mean_nothing_are_refused_in_words(void **state)
{
    struct world *w = *state;

    expect_refusal(w, "web", "VM/DISK");
    expect_refusal(w, "other/vda", "there is no export \"other/vda\"");
    expect_refusal(w, "web/vdz", "VM \"web\" has no disk \"vdz\"");
    expect_refusal(w, "web/vdz@new", "has no disk \"vdz\"");
    expect_refusal(w, "", "there are 2");
    expect_refusal(w, "web/vda@qpull-x", "qpull-");
    expect_refusal(w, "web/vda@", "");
    (void)failure_set(&w->vms[0].refusal, -EEXIST, "disk \"vda\" has a checkpoint \"old\" already");
    expect_refusal(w, "web/vda@old", "has a checkpoint \"old\" already");
    assert_int_equal(w->vms[0].nleft, 0);
}

static void the_empty_name_is_the_only_disk(void **state)
{
    struct world *w = *state;

    w->vms[0].list.ndisks = 1;
    (void)client_open(w, 0, "", STRUCTURED);
    assert_string_equal(w->vms[0].disk, "vda");
    assert_string_equal(w->vms[0].checkpoint, "");
}

static void a_checkpoint_and_dirty_contexts_reach_the_session(void **state)
{
    const char *const queries[] = {"qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:broken", "base:allocation"};
    struct world *w = *state;
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};

    say_meta(&b, NBD_OPT_SET_META_CONTEXT, "web/vda@tuesday", ARRAY_SIZE(queries), queries);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len >= 3 * NBD_OPTION_REPLY_SIZE); /* two contexts, for one is broken, and the ACK */
    loop_turn(&w->loop, 2);
    assert_null(memmem(c->in.data, c->in.len, "broken", 6));
    bytes_done(&c->in);
    say_info(&b, NBD_OPT_GO, "web/vda@tuesday", 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nentered == 1);
    assert_string_equal(w->vms[0].since, "monday");
    assert_string_equal(w->vms[0].checkpoint, "tuesday");
    loop_until(&w->loop, c->in.len > 0);
    bytes_done(&c->in);

    say_request(&b, 0, NBD_CMD_BLOCK_STATUS, 7, 0, 512 * KIB);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len >= 2 * NBD_STRUCTURED_REPLY_SIZE + 2 * 4 + 4 * 8);
    loop_turn(&w->loop, 2);
    assert_int_equal(c->in.len, 2 * NBD_STRUCTURED_REPLY_SIZE + 2 * 4 + 4 * 8); /* two contexts with two extents each */
}

static void a_context_whose_map_is_missing_refuses_the_export(void **state)
{
    const char *const queries[] = {"qemu:allocation-depth"};
    struct world *w = *state;
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};

    say_meta(&b, NBD_OPT_SET_META_CONTEXT, "web/vda", 1, queries);
    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nleft == 1);
    loop_turn(&w->loop, 2);
    assert_non_null(memmem(c->in.data, c->in.len, "could not be read", 17));
    /* and the connection can try something else */
    bytes_done(&c->in);
    say_info(&b, NBD_OPT_GO, "web/vdb", 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nentered == 2);
}

static void a_client_that_leaves_while_the_session_goes_up_is_forgotten(void **state)
{
    struct world *w = *state;
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};

    w->vms[0].hold_entering = true;
    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].stays != NULL);
    client_close(c);
    loop_until(&w->loop, w->set.nopen == 0);
    assert_int_equal(w->vms[0].nleft, 1);
    assert_int_equal(w->vms[0].nentered, 0);
}

/* -- reading ------------------------------------------------------------------------------------------------------- */
static void bytes_are_those_of_the_disk_and_zeros_are_not_read(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes b = {0};

    say_read(&b, 1, 256 * KIB, 4096);
    client_say(c, &b);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA, 1, 8 + 4096);
    put64(&b, 256 * KIB);
    put_raw(&b, w->vms[0].source.data + 256 * KIB, 4096);
    client_expect(w, c, &b);

    say_read(&b, 2, 512 * KIB, 512 * KIB);
    client_say(c, &b);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_HOLE, 2, 12);
    put64(&b, 512 * KIB);
    put32(&b, 512 * KIB);
    client_expect(w, c, &b);
}

/* About to say GO with its allocation context, where the maps of a session take their time. */
static struct client *choose_allocation(struct world *w)
{
    const char *const queries[] = {"base:allocation"};
    struct client *c = client_greet(w, 0, STRUCTURED);
    struct bytes b = {0};

    w->vms[0].unmapped = true;
    say_meta(&b, NBD_OPT_SET_META_CONTEXT, "web/vda", ARRAY_SIZE(queries), queries);
    client_say(c, &b);
    loop_until(&w->loop, c->in.len >= 2 * NBD_OPTION_REPLY_SIZE);
    loop_turn(&w->loop, 2);
    bytes_done(&c->in);
    return c;
}

/* Opened with its allocation context while the maps of the session are still being read. */
static struct client *open_unmapped(struct world *w)
{
    struct client *c = choose_allocation(w);
    struct bytes b = {0};

    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nentered == 1);
    loop_until(&w->loop, c->in.len > 0);
    loop_turn(&w->loop, 2);
    bytes_done(&c->in);
    return c;
}

/* Sent before the answer to GO is here: these are taken one by one all the same, as if they came then. */
static void requests_sent_behind_go_wait_for_the_map_one_by_one(void **state)
{
    struct world *w = *state;
    struct client *c = choose_allocation(w);
    struct bytes b = {0};

    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    for (unsigned i = 1; i <= 3; i++)
        say_request(&b, 0, NBD_CMD_BLOCK_STATUS, i, 0, 256 * KIB);
    say_disc(&b);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nentered == 1);
    loop_turn(&w->loop, 20);
    bytes_done(&c->in);
    vm_map(&w->vms[0]);
    for (unsigned i = 1; i <= 3; i++) {
        want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, i, 4 + 8);
        put32(&b, 1); /* the context's id */
        put32(&b, 256 * KIB);
        put32(&b, NBD_STATE_HOLE | NBD_STATE_ZERO);
    }
    client_expect(w, c, &b);
    loop_until(&w->loop, c->eof && w->vms[0].nleft == 1);
    assert_true(w->vms[0].last_disc);
}

/* A reply that must stay in one piece does, whatever was sent behind it, and when. */
static void no_answer_comes_into_the_middle_of_a_simple_reply(void **state)
{
    struct world *w = *state;
    struct client *c = client_greet(w, 0, SIMPLE);
    struct map *zeros, *was = w->vms[0].allocation;
    struct bytes b = {0};

    assert_int_equal(map_new_uniform(DISK_SIZE, NBD_STATE_HOLE | NBD_STATE_ZERO, &zeros), 0);
    w->vms[0].allocation = zeros;
    memset(w->vms[0].source.data, 0, DISK_SIZE);
    client_read(c, false); /* so that the zeros do not go in one turn */
    say_info(&b, NBD_OPT_GO, "web/vda", 0, NULL);
    say_read(&b, 1, 0, DISK_SIZE);
    say_request(&b, 0, NBD_CMD_WRITE_ZEROES, 2, 0, 4096);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nentered == 1);
    loop_turn(&w->loop, 20);
    client_read(c, true);
    loop_until(&w->loop, c->in.len >= DISK_SIZE + 32);
    loop_turn(&w->loop, 2);
    want_simple(&b, 0, 1);
    put_fill(&b, 0, DISK_SIZE);
    want_simple(&b, NBD_EPERM, 2);
    assert_true(c->in.len > b.len);
    assert_memory_equal(c->in.data + c->in.len - b.len, b.data, b.len);
    bytes_done(&b);
    bytes_done(&c->in);
    client_close(c);
    loop_until(&w->loop, w->set.nopen == 0);
    map_free(zeros);
    w->vms[0].allocation = was;
}

/* What is asked behind a question about the map waits with it. */
static void a_map_that_is_not_there_yet_is_waited_for_and_data_is_not(void **state)
{
    struct world *w = *state;
    struct client *c = open_unmapped(w);
    struct bytes b = {0};

    say_read(&b, 1, 512 * KIB, 4096); /* zeros, which nobody knows yet */
    client_say(c, &b);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA, 1, 8 + 4096);
    put64(&b, 512 * KIB);
    put_raw(&b, w->vms[0].source.data + 512 * KIB, 4096);
    client_expect(w, c, &b);

    say_request(&b, 0, NBD_CMD_BLOCK_STATUS, 2, 0, 512 * KIB);
    say_read(&b, 3, 512 * KIB, 512 * KIB);
    client_say(c, &b);
    loop_turn(&w->loop, 20);
    assert_int_equal(c->in.len, 0);
    vm_map(&w->vms[0]);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, 2, 4 + 2 * 8);
    put32(&b, 1); /* the context's id */
    put32(&b, 256 * KIB);
    put32(&b, NBD_STATE_HOLE | NBD_STATE_ZERO);
    put32(&b, 256 * KIB);
    put32(&b, 0);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_HOLE, 3, 12);
    put64(&b, 512 * KIB);
    put32(&b, 512 * KIB);
    client_expect(w, c, &b);
}

static void a_lost_session_answers_what_waits_for_a_map(void **state)
{
    struct world *w = *state;
    struct client *c = open_unmapped(w);
    struct bytes b = {0};

    say_request(&b, 0, NBD_CMD_BLOCK_STATUS, 2, 0, 4096);
    client_say(c, &b);
    loop_turn(&w->loop, 20);
    assert_int_equal(c->in.len, 0);
    vm_lose(&w->vms[0], "scratch is full");
    loop_until(&w->loop, c->eof);
    assert_true(c->in.len > 0);
    loop_until(&w->loop, w->vms[0].nleft == 1);
    bytes_done(&c->in);
}

static void a_client_that_leaves_while_it_waits_for_a_map_is_forgotten(void **state)
{
    struct world *w = *state;
    struct client *c = open_unmapped(w);
    struct bytes b = {0};

    say_request(&b, 0, NBD_CMD_BLOCK_STATUS, 2, 0, 4096);
    client_say(c, &b);
    loop_turn(&w->loop, 20);
    client_close(c);
    loop_turn(&w->loop, 20);
    vm_map(&w->vms[0]);
    loop_until(&w->loop, w->set.nopen == 0);
    assert_int_equal(w->vms[0].nleft, 1);
}

static void a_reply_of_one_piece_has_nothing_in_its_middle(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", SIMPLE);
    struct bytes b = {0}, other = {0};

    /* The first begins with zeros, which are there at once; the second is all zeros, and would be there before the
     * first is done; then comes something that nbd refuses by itself. */
    say_read(&b, 1, 0, 512 * KIB);
    say_read(&b, 2, 512 * KIB, 256 * KIB);
    say_request(&b, 0, NBD_CMD_WRITE_ZEROES, 3, 0, 4096);
    client_say(c, &b);
    want_simple(&b, 0, 1);
    put_fill(&b, 0, 256 * KIB);
    put_raw(&b, w->vms[0].source.data + 256 * KIB, 256 * KIB);
    put_raw(&other, b.data, b.len);
    /* If the first is not taken yet, the second waits for that, and an error waits for nothing. */
    want_simple(&other, 1 /* EPERM */, 3);
    want_simple(&b, 0, 2);
    put_fill(&b, 0, 256 * KIB);
    want_simple(&b, 1 /* EPERM */, 3);
    want_simple(&other, 0, 2);
    put_fill(&other, 0, 256 * KIB);
    client_expect_either(w, c, &b, &other);

    /* The same with one chunk among structured ones. */
    c = client_open(w, 1, "web/vda", STRUCTURED);
    say_request(&b, NBD_CMD_FLAG_DF, NBD_CMD_READ, 1, 0, 512 * KIB);
    say_read(&b, 2, 512 * KIB, 256 * KIB);
    client_say(c, &b);
    want_chunk(&b, 0, NBD_REPLY_TYPE_OFFSET_DATA, 1, 8 + 512 * KIB);
    put64(&b, 0);
    put_fill(&b, 0, 256 * KIB);
    put_raw(&b, w->vms[0].source.data + 256 * KIB, 256 * KIB);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 1, 0); /* it could still have failed */
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_HOLE, 2, 12);
    put64(&b, 512 * KIB);
    put32(&b, 256 * KIB);
    client_expect(w, c, &b);
}

/* The one that must stay whole begins when the one before it is answered, and then even what has come must wait for its
 * end. */
static void pieces_that_come_in_any_order_make_good_replies(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    uint8_t *data = w->vms[0].source.data;
    struct bytes b = {0};

    w->vms[0].source.hold = true;
    say_read(&b, 1, 1024 * KIB, 4096);
    say_request(&b, NBD_CMD_FLAG_DF, NBD_CMD_READ, 2, 0, 512 * KIB); /* zeros, which are there, and data */
    say_read(&b, 3, 2048 * KIB, 4096);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].source.nreads == 3);
    vm_answer_read(&w->vms[0], 0);
    vm_answer_read(&w->vms[0], 1); /* the third's */
    vm_answer_read(&w->vms[0], 0);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA, 1, 8 + 4096);
    put64(&b, 1024 * KIB);
    put_raw(&b, data + 1024 * KIB, 4096);
    want_chunk(&b, 0, NBD_REPLY_TYPE_OFFSET_DATA, 2, 8 + 512 * KIB);
    put64(&b, 0);
    put_fill(&b, 0, 256 * KIB);
    put_raw(&b, data + 256 * KIB, 256 * KIB);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 2, 0);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA, 3, 8 + 4096);
    put64(&b, 2048 * KIB);
    put_raw(&b, data + 2048 * KIB, 4096);
    client_expect(w, c, &b);
}

/* Of requests that are unanswered, whatever of them is being read. */
static void the_source_is_told_how_much_its_client_waits_for(void **state)
{
    struct world *w = *state;
    struct disk_source *source = &w->vms[0].source;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes b = {0};

    source->hold = true;
    say_read(&b, 1, 1024 * KIB, 4096);
    say_request(&b, 0, NBD_CMD_READ, 2, 0, 256 * KIB); /* zeros: answered at once */
    say_read(&b, 3, 2048 * KIB, 512 * KIB);
    client_say(c, &b);
    loop_until(&w->loop, source->nreads == 3);
    assert_int_equal(source->reads.first->wanted, 4096);
    assert_int_equal(source->reads.first->next->wanted, 4096 + 512 * KIB);
    assert_int_equal(source->reads.last->wanted, 4096 + 512 * KIB);
    vm_answer_read(&w->vms[0], 0);
    vm_answer_read(&w->vms[0], 0);
    say_read(&b, 4, 3072 * KIB, 8192);
    client_say(c, &b);
    loop_until(&w->loop, source->nreads == 2);
    assert_int_equal(source->reads.last->wanted, 256 * KIB + 8192);
    source->lost = true; /* the rest fails, and counts no more */
    vm_release_reads(&w->vms[0]);
    loop_until(&w->loop, source->nreads == 0);
    source->lost = false;
    source->hold = true;
    say_read(&b, 5, 4096 * KIB, 4096);
    client_say(c, &b);
    loop_until(&w->loop, source->nreads == 1);
    assert_int_equal(source->reads.first->wanted, 4096);
    vm_release_reads(&w->vms[0]);
}

/* The first request fills the window but for one byte, which the second takes: were the second one's reply begun with
 * it, the first would wait for its end, and its end for the memory that the first holds. */
static void a_reply_never_waits_for_memory_that_waits_for_it(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", SIMPLE);
    uint8_t *data = w->vms[0].source.data;
    struct bytes b = {0};

    w->vms[0].source.hold = w->vms[0].source.reverse = true;
    say_read(&b, 1, 1024 * KIB + 1, CONN_WINDOW - 1);
    say_read(&b, 2, 6144 * KIB - 1, 1024 * KIB);
    client_say(c, &b);
    loop_until(&w->loop, w->set.budget.used == CONN_WINDOW);
    vm_release_reads(&w->vms[0]);
    want_simple(&b, 0, 1);
    put_raw(&b, data + 1024 * KIB + 1, CONN_WINDOW - 1);
    want_simple(&b, 0, 2);
    put_raw(&b, data + 6144 * KIB - 1, 1024 * KIB);
    client_expect(w, c, &b);
}

static void a_long_read_comes_whole_and_within_the_window(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", SIMPLE);
    struct bytes b = {0};

    say_read(&b, 1, 1024 * KIB + 5, 7168 * KIB - 5);
    client_say(c, &b);
    want_simple(&b, 0, 1);
    put_raw(&b, w->vms[0].source.data + 1024 * KIB + 5, 7168 * KIB - 5);
    client_expect(w, c, &b);
    assert_true(w->set.budget.most <= CONN_WINDOW);
}

/* -- endings ------------------------------------------------------------------------------------------------------- */
static void disc_is_a_good_end_and_silence_is_none(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes b = {0};

    say_disc(&b);
    client_say(c, &b);
    loop_until(&w->loop, w->vms[0].nleft == 1);
    assert_true(w->vms[0].last_disc);
    assert_false(w->vms[0].last_failed);
    loop_until(&w->loop, c->eof);

    c = client_open(w, 1, "web/vda", STRUCTURED);
    client_close(c);
    loop_until(&w->loop, w->vms[0].nleft == 2);
    assert_false(w->vms[0].last_disc);
}

/* A client that just closes waits in vain; one that leaves bytes unread breaks the connection. */
static void stay_ends_after_reads(struct world *w, size_t i, bool broken)
{
    struct client *c = client_open(w, i, "web/vda", STRUCTURED);
    unsigned nleft = w->vms[0].nleft;
    struct bytes b = {0};

    if (broken) {
        client_read(c, false);
        say_read(&b, 1, 0, 4096); /* a hole: answered without a read */
    }
    w->vms[0].source.hold = true;
    say_read(&b, 2, 2048 * KIB, 1024 * KIB);
    client_say(c, &b);
    loop_until(&w->loop, w->set.budget.used == 1024 * KIB);
    client_close(c);
    loop_turn(&w->loop, 20);
    assert_int_equal(w->vms[0].nleft, nleft);
    assert_int_equal(w->set.nconns, broken ? 0 : 1);
    vm_release_reads(&w->vms[0]);
    loop_until(&w->loop, w->vms[0].nleft == nleft + 1);
    assert_false(w->vms[0].last_disc);
    loop_until(&w->loop, w->set.nopen == 0);
}

static void a_stay_ends_when_the_last_read_is_answered_and_not_before(void **state)
{
    stay_ends_after_reads(*state, 0, /* broken= */ false);
    stay_ends_after_reads(*state, 1, /* broken= */ true);
}

static void a_lost_session_answers_with_errors_and_hangs_up(void **state)
{
    struct world *w = *state;
    struct client *c = client_open(w, 0, "web/vda", STRUCTURED);
    struct bytes b = {0};

    w->vms[0].source.hold = true;
    say_read(&b, 9, 2048 * KIB, 1024 * KIB);
    client_say(c, &b);
    loop_until(&w->loop, w->set.budget.used == 1024 * KIB);
    vm_lose(&w->vms[0], "scratch is full");
    vm_release_reads(&w->vms[0]);
    loop_until(&w->loop, c->eof);
    want_chunk(&b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, 9, 4 + 2 + 15);
    put32(&b, 5 /* EIO */);
    put16(&b, 15);
    put_text(&b, "scratch is full");
    client_expect(w, c, &b);
    loop_until(&w->loop, w->vms[0].nleft == 1);
    assert_true(w->vms[0].last_failed);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, world_set_up, world_tear_down)
#define LENT(name)                                                        \
    {                                                                     \
        "lent: " #name, name, world_set_up_lending, world_tear_down, NULL \
    }
    const struct CMUnitTest tests[] = {
        TEST(disks_of_all_vms_are_listed),
        TEST(names_that_mean_nothing_are_refused_in_words),
        TEST(the_empty_name_is_the_only_disk),
        TEST(a_checkpoint_and_dirty_contexts_reach_the_session),
        TEST(a_context_whose_map_is_missing_refuses_the_export),
        TEST(a_client_that_leaves_while_the_session_goes_up_is_forgotten),
        TEST(bytes_are_those_of_the_disk_and_zeros_are_not_read),
        LENT(bytes_are_those_of_the_disk_and_zeros_are_not_read),
        TEST(requests_sent_behind_go_wait_for_the_map_one_by_one),
        TEST(no_answer_comes_into_the_middle_of_a_simple_reply),
        TEST(a_map_that_is_not_there_yet_is_waited_for_and_data_is_not),
        TEST(a_lost_session_answers_what_waits_for_a_map),
        TEST(a_client_that_leaves_while_it_waits_for_a_map_is_forgotten),
        TEST(a_reply_of_one_piece_has_nothing_in_its_middle),
        LENT(a_reply_of_one_piece_has_nothing_in_its_middle),
        TEST(pieces_that_come_in_any_order_make_good_replies),
        LENT(pieces_that_come_in_any_order_make_good_replies),
        TEST(the_source_is_told_how_much_its_client_waits_for),
        TEST(a_reply_never_waits_for_memory_that_waits_for_it),
        LENT(a_reply_never_waits_for_memory_that_waits_for_it),
        TEST(a_long_read_comes_whole_and_within_the_window),
        LENT(a_long_read_comes_whole_and_within_the_window),
        TEST(disc_is_a_good_end_and_silence_is_none),
        TEST(a_stay_ends_when_the_last_read_is_answered_and_not_before),
        LENT(a_stay_ends_when_the_last_read_is_answered_and_not_before),
        TEST(a_lost_session_answers_with_errors_and_hangs_up),
        LENT(a_lost_session_answers_with_errors_and_hangs_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
