package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// coreOptions are the flags of stasis core.
type coreOptions struct {
	pid      uint32
	file     string
	all      bool
	dir      string
	force    bool
	maxBytes int64
}

func (c *cli) coreCommand() *cobra.Command {
	var o coreOptions
	cmd := &cobra.Command{
		Use:   "core ID|ARCHIVE {--pid PID -o FILE | --all -d DIR}",
		Short: "Write a process of a checkpoint as a core file for gdb",
		Long: `core writes a process of a checkpoint, as it was when it was dumped, as an ELF
core file: gdb shows its threads, stacks and memory. The checkpoint is one of
the store, committed or quarantined, or an archive of stasis export or of the
CRI checkpoint call; a name with a dot or a slash is an archive's. It stays as
it is.

PID is the process's in the container, as stasis inspect --processes shows it.
With --all each process gets a file core.PID in DIR.

Code and constant data are in the container's image, not in the core file: give
gdb the executable, and with "set sysroot" a directory with the image's files.
Without it gdb takes the files of the same names on this machine, which may be
others.

Files get mode 0600 and appear only when they are complete: they hold the memory
of the container, with whatever secrets are there. Room for a copy of the memory
is needed beside them, and for an archive's images once more while it is read.`,
		Example: `  stasis core 0123 --pid 1 -o /root/core.1
  gdb -iex 'set sysroot /mnt/image' /mnt/image/usr/bin/redis-server /root/core.1
  stasis core /var/lib/kubelet/checkpoints/checkpoint-x.tar --all -d /root/cores`,
		Args: usage(cobra.ExactArgs(1)),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			if isArchive(s) {
				return nil, cobra.ShellCompDirectiveDefault
			}
			ids, d := c.completeIDs(cmd, args, s)
			return ids, d &^ cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if one, all := o.pid > 0 && o.file != "", o.all && o.dir != ""; one == all || one && (o.all || o.dir != "") || all && (o.pid > 0 || o.file != "") {
				return usageError{errors.New("give either --pid and -o, or --all and -d")}
			}
			return c.core(cmd.Context(), args[0], o)
		},
	}
	f := cmd.Flags()
	f.Uint32Var(&o.pid, "pid", 0, "the process, by its id in the container")
	f.StringVarP(&o.file, "output", "o", "", "write its core file there")
	f.BoolVar(&o.all, "all", false, "write all processes")
	f.StringVarP(&o.dir, "directory", "d", "", "write their core files there; made if it is not there")
	f.BoolVar(&o.force, "force", false, "replace files that are there")
	f.Int64Var(&o.maxBytes, "max-bytes", 64<<30, "refuse an archive whose files are larger in sum")
	return cmd
}

// isArchive tells an archive's name from a checkpoint's ID.
func isArchive(name string) bool { return strings.ContainsAny(name, "./") }

func (c *cli) core(ctx context.Context, name string, o coreOptions) (err error) {
	if o.all {
		if err := os.Mkdir(o.dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	} else {
		o.dir = filepath.Dir(o.file)
	}
	var images string
	if isArchive(name) {
		tmp, err := os.MkdirTemp(o.dir, ".stasis-core-*") // mode 0700
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
		if err := extractImages(ctx, name, tmp, o.maxBytes); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		images = filepath.Join(tmp, checkpoint.ImageDir)
	} else {
		st, err := c.open()
		if err != nil {
			return err
		}
		r, err := resolve(ctx, st, name)
		if err != nil {
			return err
		}
		if r.State == store.Claimed {
			return fmt.Errorf("checkpoint %s is being restored: %w", r.ID, checkpoint.ErrBusy)
		}
		name, images = "checkpoint "+string(r.ID), filepath.Join(r.Path, checkpoint.ImageDir)
	}
	report, err := criu.Inspect(images)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, p := range report.Processes {
		file := o.file
		switch {
		case o.all && p.State == "zombie": // has no memory
			continue
		case o.all:
			file = filepath.Join(o.dir, fmt.Sprintf("core.%d", p.PID))
		case p.PID != o.pid:
			continue
		}
		n, err := writeAtomically(file, o.force, func(f *os.File) error { return criu.WriteCore(ctx, images, p.PID, f) })
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(c.out, "%s: process %d, %s (%s), %d threads, %s\n", file, p.PID, p.Comm, clean(p.Exe), len(p.Threads), size(n))
		if !o.all {
			return nil
		}
	}
	if !o.all {
		return fmt.Errorf("%s has no process %d; stasis inspect --processes shows those of a checkpoint: %w", name, o.pid, errdefs.ErrNotFound)
	}
	return nil
}

// coreImages are the images that are needed for a core file.
var coreImages = regexp.MustCompile(`^(inventory|pstree|files|remap-fpath|memfd|(core|ids|mm|fdinfo|pagemap|pagemap-shmem|pages)-[0-9]{1,10})\.img$`)

// extractImages copies those images of an archive, hostile as it may be, to
// dir/checkpoint.
func extractImages(ctx context.Context, archive, dir string, limit int64) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	plain, err := gunzip(f)
	if err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, checkpoint.ImageDir), 0o700); err != nil {
		return err
	}
	u := &unpacker{ctx: ctx, dir: dir, left: limit, seen: map[string]bool{}}
	// What is skipped counts as well: a compressed archive may grow without end.
	limited := &io.LimitedReader{R: contextReader{ctx, plain}, N: limit + maxMembers*1024}
	tr := tar.NewReader(limited)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) && limited.N > 0 {
			break
		}
		if err != nil {
			if limited.N <= 0 {
				err = errors.New("larger than --max-bytes allows")
			}
			return fmt.Errorf("archive: %w: %w", err, checkpoint.ErrInvalid)
		}
		if u.members++; u.members > maxMembers {
			return fmt.Errorf("archive: more than %d members: %w", maxMembers, checkpoint.ErrInvalid)
		}
		for k := range h.PAXRecords {
			if strings.HasPrefix(k, "GNU.sparse.") { // archive/tar expands it out of all proportion
				return refuse(h.Name, "sparse")
			}
		}
		name := strings.TrimPrefix(h.Name, "./")
		sub, base := path.Split(name)
		if sub != metadata.CheckpointDirectory+"/" || !coreImages.MatchString(base) {
			continue
		}
		switch {
		case h.Typeflag != tar.TypeReg:
			return refuse(h.Name, "type %q, want a regular file", h.Typeflag)
		case u.seen[name]:
			return refuse(h.Name, "twice")
		}
		u.seen[name] = true
		if err := u.write(name, h.Size, tr); err != nil {
			return err
		}
	}
	if !u.seen[metadata.CheckpointDirectory+"/inventory.img"] {
		return fmt.Errorf("archive: no %s/inventory.img, so this is no checkpoint of a container: %w", metadata.CheckpointDirectory, checkpoint.ErrInvalid)
	}
	return nil
}
