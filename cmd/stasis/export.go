package main

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/layer"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// statsFile is CRIU's statistics of the dump.
const statsFile = "stats-dump"

func (c *cli) exportCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "export ID FILE",
		Short: "Write a checkpoint as a standard archive",
		Long: `export writes a checkpoint in the form that the CRI checkpoint call of the
kubelet, Podman and CRI-O know: a tar file with config.dump, spec.dump,
checkpoint/, rootfs-diff.tar, deleted.files, dump.log and stats-dump.
checkpointctl, crit, and gdb by way of coredumps read it. stasis's own
manifest.json and volumes/ are in it as well, for stasis import.

Checksums are verified on the way. FILE gets mode 0600 and appears only when it
is complete: it holds the memory of the container, with whatever secrets are
there. The checkpoint stays as it is.`,
		Example: `  stasis export 0123 /root/db-0.tar && checkpointctl inspect --ps-tree /root/db-0.tar`,
		Args:    usage(cobra.ExactArgs(2)),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, s string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return c.completeIDs(cmd, args, s)
			}
			return nil, cobra.ShellCompDirectiveDefault
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			st, err := c.open()
			if err != nil {
				return err
			}
			r, err := resolve(cmd.Context(), st, args[0])
			if err != nil {
				return err
			}
			switch {
			case r.State == store.Claimed:
				return fmt.Errorf("checkpoint %s is being restored: %w", r.ID, checkpoint.ErrBusy)
			case r.Manifest == nil:
				return fmt.Errorf("checkpoint %s: %w", r.ID, r.Err)
			}
			n, err := writeAtomically(args[1], force, func(f *os.File) error { return export(cmd.Context(), f, r) })
			if err != nil {
				return fmt.Errorf("export checkpoint %s: %w", r.ID, err)
			}
			if c.output == "json" {
				return c.printJSON(map[string]any{"id": r.ID, "file": args[1], "sizeBytes": n})
			}
			_, err = fmt.Fprintf(c.out, "%s: %s, %s\n", args[1], r.ID, size(n))
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "replace FILE if it is there")
	return cmd
}

// writeAtomically makes a file of mode 0600 that appears under its name when it
// is complete and durable. It returns the file's size in bytes.
func writeAtomically(name string, replace bool, write func(*os.File) error) (size int64, err error) {
	dir := filepath.Dir(name)
	if _, err := os.Lstat(name); err == nil && !replace {
		return 0, fmt.Errorf("%s is there already; give another name, or --force", name)
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(name)+"-*") // mode 0600
	if err != nil {
		return 0, err
	}
	defer func() {
		f.Close()
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := write(f); err != nil {
		return 0, err
	}
	if size, err = f.Seek(0, io.SeekEnd); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, err
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if replace {
		flags = 0
	}
	if err := unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, name, flags); err != nil {
		return 0, &os.LinkError{Op: "rename", Old: f.Name(), New: name, Err: err}
	}
	d, err := os.Open(dir)
	if err != nil {
		return size, nil // it is there, and complete
	}
	defer d.Close()
	_ = d.Sync() // some file systems cannot
	return size, nil
}

// export writes the archive of a record.
func export(ctx context.Context, f *os.File, r store.Record) error {
	bw := bufio.NewWriterSize(f, 1<<20)
	a := &archiver{tw: tar.NewWriter(bw), dir: r.Path, tmp: filepath.Dir(f.Name()), at: r.Manifest.CreatedAt}
	if err := a.write(ctx, r.Manifest); err != nil {
		return err
	}
	if err := a.tw.Close(); err != nil {
		return err
	}
	return bw.Flush()
}

type archiver struct {
	tw  *tar.Writer
	dir string    // of the checkpoint
	tmp string    // for what must be made aside
	at  time.Time // of all members
}

func (a *archiver) write(ctx context.Context, m *checkpoint.Manifest) error {
	config := metadata.ContainerConfig{
		ID: m.ContainerID, Name: m.Identity.Container, OCIRuntime: "io.containerd.runc.v2",
		RootfsImage: m.ImageName, RootfsImageName: m.ImageName, RootfsImageRef: m.ImageDigest,
		CreatedTime: m.CreatedAt.Add(-time.Duration(m.UptimeMillis) * time.Millisecond), CheckpointedAt: m.CreatedAt,
	}
	whole := *m
	m = &whole
	m.Files = slices.DeleteFunc(slices.Clone(m.Files), checkpoint.File.OfMapped) // made of the others, for this node
	manifest, err := m.Encode()
	if err != nil {
		return err
	}
	if err := errors.Join(a.json(metadata.ConfigDumpFile, config), a.bytes(checkpoint.ManifestFile, manifest)); err != nil {
		return err
	}
	dirs := map[string]bool{}
	for _, f := range m.Files {
		top, _, nested := strings.Cut(f.Path, "/")
		switch {
		case f.Path == checkpoint.RootfsDiffFile:
			if err := a.rootfsDiff(ctx, f); err != nil {
				return err
			}
			continue
		case f.Path == checkpoint.SpecFile, f.Path == checkpoint.DumpLogFile, f.Path == statsFile:
		case nested && (top == checkpoint.ImageDir || top == checkpoint.VolumeDir):
			if !dirs[top] {
				dirs[top] = true
				if err := a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: top + "/", Mode: 0o700, ModTime: a.at}); err != nil {
					return err
				}
			}
		default:
			return fmt.Errorf("file %q has no place in an archive", f.Path)
		}
		if err := a.file(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

func (a *archiver) header(name string, size int64) error {
	return a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: a.at})
}

func (a *archiver) bytes(name string, b []byte) error {
	if err := a.header(name, int64(len(b))); err != nil {
		return err
	}
	_, err := a.tw.Write(b)
	return err
}

func (a *archiver) json(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return a.bytes(name, b)
}

// file copies one file of the checkpoint and compares its checksum.
func (a *archiver) file(ctx context.Context, f checkpoint.File) error {
	if err := a.header(f.Path, f.SizeBytes); err != nil {
		return err
	}
	r, err := openChecked(ctx, a.dir, f)
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := io.Copy(a.tw, r); err != nil {
		return err
	}
	return r.check()
}

// rootfsDiff writes the writable layer as an OCI layer, and the list of what
// is gone. A tar member's size comes first, so it is made aside.
func (a *archiver) rootfsDiff(ctx context.Context, f checkpoint.File) error {
	r, err := openChecked(ctx, a.dir, f)
	if err != nil {
		return err
	}
	defer r.Close()
	tmp, err := os.CreateTemp(a.tmp, ".stasis-*")
	if err != nil {
		return err
	}
	defer tmp.Close()
	if err := os.Remove(tmp.Name()); err != nil { // lives on as long as it is open
		return err
	}
	if err := layer.WriteOCIDiff(ctx, tmp, r); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	gone, err := whiteouts(tmp)
	if err != nil {
		return err
	}
	if err := a.json(metadata.DeletedFilesFile, gone); err != nil {
		return err
	}
	end, err := tmp.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = tmp.Seek(0, io.SeekStart)
	}
	if err != nil {
		return err
	}
	if err := a.header(metadata.RootFsDiffTar, end); err != nil {
		return err
	}
	_, err = io.Copy(a.tw, tmp)
	return err
}

// Names by which an OCI layer says what is gone (image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// whiteouts lists the paths that an OCI layer removes, as Podman does: absolute
// and sorted.
func whiteouts(f io.ReadSeeker) ([]string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	gone := []string{}
	tr := tar.NewReader(bufio.NewReader(f))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			slices.Sort(gone)
			return gone, nil
		}
		if err != nil {
			return nil, err
		}
		dir, base := path.Split(h.Name)
		if name, ok := strings.CutPrefix(base, whiteoutPrefix); ok && base != opaqueName {
			gone = append(gone, path.Join("/", dir, name))
		}
	}
}

// checked reads a file of the checkpoint and sums it up.
type checked struct {
	ctx  context.Context
	f    *os.File
	want checkpoint.File
	sum  uint32
	n    int64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func openChecked(ctx context.Context, dir string, want checkpoint.File) (*checked, error) {
	corrupt := func(err error) error { return fmt.Errorf("file %s: %w: %w", want.Path, checkpoint.ErrCorrupt, err) }
	d, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(d)
	fd, err := unix.Openat2(d, want.Path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return nil, corrupt(err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(dir, want.Path))
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() != want.SizeBytes) {
		err = fmt.Errorf("%s of %d bytes, want a regular file of %d", st.Mode().Type(), st.Size(), want.SizeBytes)
	}
	if err != nil {
		f.Close()
		return nil, corrupt(err)
	}
	return &checked{ctx: ctx, f: f, want: want}, nil
}

func (c *checked) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	if left := c.want.SizeBytes - c.n; left < int64(len(b)) {
		if left == 0 {
			return 0, io.EOF
		}
		b = b[:left]
	}
	n, err := c.f.Read(b)
	c.sum = crc32.Update(c.sum, castagnoli, b[:n])
	c.n += int64(n)
	return n, err
}

func (c *checked) Close() error { return c.f.Close() }

// check compares, after all was read.
func (c *checked) check() error {
	if got := fmt.Sprintf("%08x", c.sum); c.n != c.want.SizeBytes || got != c.want.CRC32C {
		return fmt.Errorf("file %s: checksum %s of %d bytes, want %s of %d: %w", c.want.Path, got, c.n, c.want.CRC32C, c.want.SizeBytes, checkpoint.ErrCorrupt)
	}
	return nil
}
