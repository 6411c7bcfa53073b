// prep/outcomes.h - what became of the records of a source: counted, written, listed
//
//   convert_source()   converts a source chunk by chunk
//   write_outcomes()   counts and writes a chunk

// A row of --rejects.
static void write_reject(OutFile *out, uint32_t number, const char *name, size_t length,
                         int64_t line, const char *reason) {
    if (!out->file) return;
    fprintf(out->file, "%lu,", (unsigned long)number);
    print_csv(out->file, name, length);
    fprintf(out->file, ",%lld,", (long long)line);
    print_csv(out->file, reason, strlen(reason));
    fputc('\n', out->file);
}

// Counts an unusual cell of a record that is kept; lists it if it is missing for that.
static void count_odd(const Conversion *c, const Source *s, Summary *sum, const OddCell *odd,
                      uint32_t number, const uint8_t *record, const Outcome *o) {
    int64_t line = c->labels.n_rows ? odd->line : s->line + odd->line;
    tally_odd(&sum->tally[odd->task], odd, c->labels.n_rows ? c->labels.path : s->path, line);
    if (odd->kind < CELL_CENSORED || !sum->rejects.file) return;
    size_t length = get_u16(record + 10);
    char *reason = xprintf("kept without its label \"%s\": \"%s\" is %s", c->task_names[odd->task],
                           odd->text, odd->kind == CELL_BAD ? "no number" : "censored");
    write_reject(&sum->rejects, number, (const char *)record + o->size - length, length, line,
                 reason);
    free(reason);
}

// Counts the outcomes of a chunk and writes what was kept. In a record, labels and name come last.
static void write_outcomes(Source *s, const Outcome *outcomes, int n, Worker *workers, Output *out,
                           Conversion *c, Summary *sum) {
    for (int k = 0; k < n; k++) {
        const Outcome *o = &outcomes[k];
        const char *bytes = workers[o->worker].bytes.text;
        const uint8_t *record = o->none ? NULL : (const uint8_t *)bytes + o->offset;
        sum->n_read += !o->none;
        table_use(&c->skips, o->skip);
        table_use(&c->parts, o->in_part);
        uint32_t number = (uint32_t)sum->n_read;
        if (o->ok) {
            if (sum->n_kept == (int64_t)sum->twin_room)
                sum->twins = xrealloc(sum->twins, sum->twin_room = 2 * sum->twin_room + 1024,
                                      sizeof *sum->twins);
            const uint8_t *label = record + o->size - get_u16(record + 10) - 4 * (size_t)c->n_tasks;
            uint32_t labels = crc32_add(0, label, 4 * (size_t)c->n_tasks);
            sum->twins[sum->n_kept] = (Twin){o->molecule, labels, (uint32_t)sum->n_kept};
            sum->n_kept++;
            sum->n_atoms += o->n_atoms;
            sum->unmatched += c->labels.n_rows && !o->side_row;
            sum->mixtures += o->mixture;
            if (c->labels.n_rows) c->labels.used[o->side_row] = 1;
            if (o->note.kind) count_fault(sum, s, s->line, &o->note, 1);
            for (int t = 0; t < c->n_tasks; t++, label += 4)
                tally_value(&sum->tally[t], get_f32(label));
            for (int j = 0; j < o->n_odd; j++)
                count_odd(c, s, sum, &workers[o->worker].odd[o->first_odd + j], number, record, o);
            if (out->n_parts > 1)
                pool_append(&out->pool, record, o->size, number, c->want_keys ? &o->key : NULL);
            else dataset_append(&out->writer, record, o->size, number);
        } else if (!o->none) {
            if (c->opt->strict) DIE("%s", describe_fault(s, s->line, &o->fault));
            count_fault(sum, s, s->line, &o->fault, 0);
            write_reject(&sum->rejects, number, (const char *)record, o->size,
                         s->line + max_int(o->fault.line, 1) - 1, o->fault.text);
            dataset_skip(&out->writer, number, (const char *)record, o->size, o->fault.text);
        }
        s->line += o->n_lines;
    }
}

// Converts one source chunk by chunk.
static void convert_source(Source *s, Conversion *c, Output *out, Worker *workers,
                           Record *records, Outcome *outcomes, Summary *sum) {
    Progress progress = progress_begin(0);
    int n;
    CHECK(!c->labels.n_rows || s->format == FORMAT_SDF, "%s: --labels-from is for SD files",
          s->path);
    s->name_column = -1;
    s->n_records = sum->n_read;
    for (int first = 1; (n = next_records(s, records)) > 0; first = 0) {
        int skip = first && is_table(s);
        if (mb_signal) mb_exit(128 + mb_signal);  // and nothing is left
        if (skip) {
            read_header(c, s, &records[0], n > 1 ? records + 1 : NULL);
            s->task_of_column = columns_of_tasks(c, s->path, s->columns, s->n_columns);
        } else if (first && s->format == FORMAT_SDF && !c->labels.n_rows && !wants_all(c->opt)) {
            check_tags(c, s, records, n);
        } else if (first && s->format == FORMAT_SMI && c->n_tasks) {
            fprintf(stderr, "note    %s: a .smi file has no labels; if its first line names "
                    "columns, give --format csv\n", s->path);
        }
        for (int t = 0; t < thread_count(); t++) workers[t].bytes.length = 0, workers[t].n_odd = 0;
        convert_records(c, s, records + skip, n - skip, workers, outcomes);
        write_outcomes(s, outcomes, n - skip, workers, out, c, sum);
        progress_show(&progress, (double)s->bytes_done, (double)s->bytes_total, (double)sum->n_read,
                      "records", s->path, 0);
    }
}
