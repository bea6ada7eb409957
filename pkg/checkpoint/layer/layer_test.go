package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// sampleTree has one of everything that needs no privilege.
func sampleTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, n := range []int{0, 1, 511, 512, 513, bufferSize - 1, bufferSize + 1} {
		write(t, dir, fmt.Sprintf("size/%d", n), strings.Repeat("stasis!", n/7+1)[:n])
	}
	for _, n := range []string{"name with space ", "-n", "new\nline", "ümläut", "\xff\xfe", strings.Repeat("n", 255), ".wh.file", "...", "a\\b"} {
		write(t, dir, "names/"+n, n)
	}
	write(t, dir, strings.Repeat("deep/directory/", 60)+"file", "deep")
	for i, target := range []string{"size/1", "/etc/passwd", "../../..", "nowhere", strings.Repeat("x", 1000)} {
		must(t, os.Symlink(target, filepath.Join(dir, fmt.Sprintf("symlink%d", i))))
	}
	must(t, os.Link(filepath.Join(dir, "size/513"), filepath.Join(dir, "names/zlink")),
		os.Link(filepath.Join(dir, "size/513"), filepath.Join(dir, "alink")),
		os.Link(filepath.Join(dir, "symlink1"), filepath.Join(dir, "symlink1-again")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o640),
		os.Mkdir(filepath.Join(dir, "empty"), 0o700))
	setxattr(t, filepath.Join(dir, "size/1"), "user.binary", "a\x00b\n=\xff")
	setxattr(t, filepath.Join(dir, "size/1"), "user.empty", "")
	setxattr(t, filepath.Join(dir, "size/1"), "user.a=b", "equals")
	setxattr(t, filepath.Join(dir, "size"), "user.directory", "yes")
	setxattr(t, dir, "user.root", "yes")
	for name, mode := range map[string]uint32{"size/0": 0o4755, "size/511": 0o2711, "size/512": 0o400, "empty": 0o1777, "size": 0o2750, ".": 0o711} {
		must(t, unix.Chmod(filepath.Join(dir, name), mode))
	}
	setMtime(t, filepath.Join(dir, "size/0"), time.Unix(1, 1))
	setMtime(t, filepath.Join(dir, "size/1"), time.Unix(-86400, 999999999))
	setMtime(t, filepath.Join(dir, "symlink0"), time.Unix(1234567890, 123456789))
	setMtime(t, filepath.Join(dir, "deep/directory"), time.Unix(1e9, 5))
	setMtime(t, dir, time.Unix(1e9, 7))
	return dir
}

func TestRoundTrip(t *testing.T) {
	dir := sampleTree(t)
	layer, stats := capture(t, dir)
	again, _ := capture(t, dir)
	if !bytes.Equal(layer, again) {
		t.Error("the same tree gave two layers")
	}
	out := t.TempDir()
	a := apply(t, layer, out, Options{})
	want := describe(t, dir)
	compare(t, describe(t, out), want)
	if stats.Entries != int64(len(want)) || a.Entries != int64(len(want)-1) || a.Bytes != stats.Bytes {
		t.Errorf("captured %+v, applied %d entries, %d bytes; the tree has %d", stats, a.Entries, a.Bytes, len(want))
	}
}

// TestTarLists: an ordinary tar program reads a layer.
func TestTarLists(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a/file", "content")
	layer, _ := capture(t, dir)
	cmd := exec.Command("tar", "-tf", "-")
	cmd.Stdin = bytes.NewReader(layer)
	out, err := cmd.Output()
	if err != nil || string(out) != "./\na/\na/file\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestSparse(t *testing.T) {
	const gib = 1 << 30
	for _, tt := range []struct {
		name string
		size int64
		data []int64 // offsets at which 4096 bytes lie
	}{
		{"hole only", gib, nil},
		{"hole of one byte", 1, nil},
		{"middle", gib, []int64{gib / 2}},
		{"both ends", gib, []int64{0, gib - 4096}},
		{"no hole", 8192, []int64{0, 4096}},
		{"unaligned end", gib + 1, []int64{gib - 8192}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, out := t.TempDir(), t.TempDir()
			f, err := os.Create(filepath.Join(dir, "f"))
			must(t, err, f.Truncate(tt.size))
			block := bytes.Repeat([]byte("x"), 4096)
			for _, off := range tt.data {
				_, err := f.WriteAt(block, off)
				must(t, err)
			}
			must(t, f.Close())
			layer, stats := capture(t, dir)
			if want := int64(4096 * len(tt.data)); stats.Bytes != want {
				t.Errorf("%d bytes captured, want %d", stats.Bytes, want)
			}
			apply(t, layer, out, Options{})
			var st unix.Stat_t
			must(t, unix.Stat(filepath.Join(out, "f"), &st))
			if st.Size != tt.size || st.Blocks*512 > int64(len(tt.data)+1)*4096 {
				t.Errorf("size %d in %d blocks, want %d and %d pieces of data", st.Size, st.Blocks, tt.size, len(tt.data))
			}
			got, err := os.Open(filepath.Join(out, "f"))
			must(t, err)
			defer got.Close()
			b := make([]byte, 4096)
			for _, off := range tt.data {
				if _, err := got.ReadAt(b, off); err != nil || !bytes.Equal(b, block) {
					t.Errorf("data at %d differs (%v)", off, err)
				}
			}
			if slices.Contains(tt.data, 0) == false {
				if n, err := got.ReadAt(b, 0); err != nil && err != io.EOF || !bytes.Equal(b[:n], make([]byte, n)) {
					t.Errorf("no zeros at the start (%v)", err)
				}
			}
		})
	}
}

// TestManyHoles: the map of a file in more pieces than a layer can list stays
// bounded, and no data is left out of it.
func TestManyHoles(t *testing.T) {
	const stride = 12288
	for _, pieces := range []int64{500, maxSegments, maxSegments + 1, 2*maxSegments + 100} {
		t.Run(fmt.Sprint(pieces), func(t *testing.T) {
			dir := t.TempDir()
			f, err := os.Create(filepath.Join(dir, "f"))
			must(t, err)
			defer f.Close()
			for i := range pieces {
				_, err := f.WriteAt([]byte{byte(i), 1}, i*stride)
				must(t, err)
			}
			size := (pieces-1)*stride + 2
			segs, err := dataSegments(f, size)
			must(t, err)
			if n := int64(len(segs)); n > maxSegments || pieces <= maxSegments && n != pieces {
				t.Errorf("%d segments for %d pieces", n, pieces)
			}
			body := int64(0)
			for i, at := range segs {
				body += at.len
				if i > 0 && at.off <= segs[i-1].off+segs[i-1].len {
					t.Fatalf("segment %v after %v", at, segs[i-1])
				}
			}
			for i := range pieces {
				if !slices.ContainsFunc(segs, func(s segment) bool { return s.off <= i*stride && i*stride+2 <= s.off+s.len }) {
					t.Fatalf("the data at %d is in no segment", i*stride)
				}
			}
			if got, parsed, err := parseSparse(formatSparse(size, segs), body); err != nil || got != size || !slices.Equal(parsed, segs) {
				t.Errorf("the map does not survive: %v", err)
			}
			if pieces == 500 {
				out := t.TempDir()
				layer, _ := capture(t, dir)
				apply(t, layer, out, Options{})
				compare(t, describe(t, out), describe(t, dir))
			}
		})
	}
}

func TestMergeSegments(t *testing.T) {
	got := mergeSegments([]segment{{0, 10}, {15, 5}, {30, 1}, {32, 1}}, 5)
	if want := []segment{{0, 20}, {30, 3}}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestSocketsAreLeftOut(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(t, err)
	defer l.Close()
	layer, stats := capture(t, dir)
	if stats.Sockets != 1 || stats.Entries != 1 {
		t.Errorf("%+v", stats)
	}
	out := t.TempDir()
	apply(t, layer, out, Options{})
	if got := describe(t, out); len(got) != 1 {
		t.Errorf("%v", got)
	}
}

// writerFunc calls itself once for each Write.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// TestChangesMeanwhile: a tree that changes while it is read still gives a
// layer that is whole.
func TestChangesMeanwhile(t *testing.T) {
	big := strings.Repeat("x", 3*bufferSize)
	for _, tt := range []struct {
		name   string
		change func(dir string) error
		want   string // content of "big", nothing of it after the first buffer if cut
	}{
		{"shrinks", func(dir string) error { return os.Truncate(filepath.Join(dir, "big"), 10) }, ""},
		{"grows", func(dir string) error { return os.WriteFile(filepath.Join(dir, "big"), []byte(big+big), 0o600) }, big},
		{"vanishes", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "z")) }, big},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir, out := t.TempDir(), t.TempDir()
			write(t, dir, "big", big)
			write(t, dir, "z/file", "")
			var b bytes.Buffer
			changed := false
			_, err := Capture(context.Background(), writerFunc(func(p []byte) (int, error) {
				if !changed {
					changed = true
					must(t, tt.change(dir))
				}
				return b.Write(p)
			}), dir)
			must(t, err)
			apply(t, b.Bytes(), out, Options{})
			got, err := os.ReadFile(filepath.Join(out, "big"))
			must(t, err)
			if len(got) != len(big) {
				t.Fatalf("%d bytes, want %d", len(got), len(big))
			}
			if tt.want != "" && string(got) != tt.want {
				t.Error("content differs")
			}
			if tt.want == "" && (got[0] != 'x' || got[len(got)-1] != 0) {
				t.Error("want what was read, then zeros")
			}
		})
	}
}

// TestWriterFails: wherever the writer fails, Capture and WriteOCIDiff say so.
func TestWriterFails(t *testing.T) {
	dir := t.TempDir()
	for i := range 20 {
		write(t, dir, fmt.Sprintf("d%d/f", i), strings.Repeat("x", i*10000))
	}
	layer, _ := capture(t, dir)
	for name, run := range map[string]func(io.Writer) error{
		"capture": func(w io.Writer) error { _, err := Capture(context.Background(), w, dir); return err },
		"convert": func(w io.Writer) error { return WriteOCIDiff(context.Background(), w, bytes.NewReader(layer)) },
	} {
		t.Run(name, func(t *testing.T) {
			var whole bytes.Buffer
			must(t, run(&whole))
			for n := 0; n < whole.Len(); n += 9999 {
				left := n
				err := run(writerFunc(func(p []byte) (int, error) {
					if left -= len(p); left < 0 {
						return len(p) + left, unix.ENOSPC
					}
					return len(p), nil
				}))
				if !errors.Is(err, unix.ENOSPC) {
					t.Fatalf("failing at byte %d of %d: %v", n, whole.Len(), err)
				}
			}
		})
	}
}

func TestCancel(t *testing.T) {
	dir := sampleTree(t)
	layer, _ := capture(t, dir)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Capture(ctx, io.Discard, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("capture: %v", err)
	}
	if _, err := Apply(ctx, bytes.NewReader(layer), t.TempDir(), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("apply: %v", err)
	}
	if err := WriteOCIDiff(ctx, io.Discard, bytes.NewReader(layer)); !errors.Is(err, context.Canceled) {
		t.Errorf("convert: %v", err)
	}
}

// TestCancelWithinFile: a large file does not delay a cancellation.
func TestCancelWithinFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", strings.Repeat("x", 8*bufferSize))
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	_, err := Capture(ctx, writerFunc(func(p []byte) (int, error) { cancel(); n += len(p); return len(p), nil }), dir)
	if !errors.Is(err, context.Canceled) || n > 3*bufferSize {
		t.Errorf("%d bytes written: %v", n, err)
	}
}

// TestUndo: after any failure and after success, Undo gives back exactly the
// directory that was there.
func TestUndo(t *testing.T) {
	src := t.TempDir()
	for _, n := range []string{"a/b/c", "a/d", "e", "a/big"} {
		write(t, src, n, strings.Repeat(n, 700))
	}
	must(t, os.Symlink("a", filepath.Join(src, "s")), os.Link(filepath.Join(src, "e"), filepath.Join(src, "l")), os.Chmod(src, 0o750))
	setxattr(t, src, "user.a", "new")
	setxattr(t, src, "user.b", "new")
	layer, _ := capture(t, src)
	for _, opt := range []Options{{}, {SkipExisting: true}} {
		t.Run(fmt.Sprintf("skip=%v", opt.SkipExisting), func(t *testing.T) {
			dir := t.TempDir()
			setxattr(t, dir, "user.a", "old")
			setxattr(t, dir, "user.c", "old")
			write(t, dir, "kept", "kept")
			if opt.SkipExisting {
				write(t, dir, "a/d", "kept")
			}
			setMtime(t, dir, time.Unix(1e9, 1))
			before := describe(t, dir)
			for n := 0; n <= len(layer); n += 300 {
				a, err := Apply(context.Background(), bytes.NewReader(layer[:n]), dir, opt)
				// After the record of the end there is only padding.
				if n < len(layer)-1536 && !errors.Is(err, checkpoint.ErrCorrupt) || n >= len(layer)-1024 && err != nil {
					t.Fatalf("%d of %d bytes: %v", n, len(layer), err)
				}
				must(t, a.Undo(), a.Undo())
				if after := describe(t, dir); !slices.Equal(before, after) {
					t.Errorf("after %d of %d bytes and Undo:", n, len(layer))
					compare(t, after, before)
				}
			}
		})
	}
}

func TestApplyRefusesExisting(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	write(t, src, "a", "new")
	write(t, dir, "a", "old")
	layer, _ := capture(t, src)
	before := describe(t, dir)
	a, err := Apply(context.Background(), bytes.NewReader(layer), dir, Options{})
	if !errors.Is(err, os.ErrExist) {
		t.Errorf("%v", err)
	}
	must(t, a.Undo())
	compare(t, describe(t, dir), before)
}

func TestSkipExisting(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	for _, n := range []string{"both/new", "both/old", "only/new", "link/inside", "file/inside", "linked"} {
		write(t, src, n, "from the layer")
	}
	must(t, os.Link(filepath.Join(src, "linked"), filepath.Join(src, "other")), os.Chmod(filepath.Join(src, "both"), 0o777))
	layer, _ := capture(t, src)

	outside := t.TempDir()
	write(t, dir, "both/old", "kept, and longer than the other")
	write(t, dir, "file", "kept")
	write(t, dir, "linked", "kept")
	must(t, os.Symlink(outside, filepath.Join(dir, "link")), os.Chmod(filepath.Join(dir, "both"), 0o700))
	setMtime(t, filepath.Join(dir, "both"), time.Unix(1e9, 1))
	setMtime(t, dir, time.Unix(1e9, 2))
	before := describe(t, dir)

	a := apply(t, layer, dir, Options{SkipExisting: true})
	after := describe(t, dir)
	for _, l := range before {
		if !slices.Contains(after, l) {
			t.Errorf("changed: %s", l)
		}
	}
	if len(after) != len(before)+3 { // both/new, only, only/new
		t.Errorf("%d entries, want %d: %v", len(after), len(before)+3, after)
	}
	if a.Entries != 3 || a.Skipped != 8 {
		t.Errorf("%d made, %d skipped, want 3 and 8", a.Entries, a.Skipped)
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("written through a symbolic link: %v", names)
	}
	must(t, a.Undo())
	compare(t, describe(t, dir), before)
}

// TestUndoLeavesOthersAlone: what somebody else did to a live volume since
// stays.
func TestUndoLeavesOthersAlone(t *testing.T) {
	src, dir := t.TempDir(), t.TempDir()
	write(t, src, "mine", "1")
	write(t, src, "replaced", "1")
	write(t, src, "d/mine", "1")
	layer, _ := capture(t, src)
	a := apply(t, layer, dir, Options{SkipExisting: true})
	must(t, os.Rename(write(t, dir, "tmp", "2"), filepath.Join(dir, "replaced")))
	write(t, dir, "d/theirs", "2")
	if err := a.Undo(); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("%v, want that d is not empty", err)
	}
	for name, there := range map[string]bool{"mine": false, "d/mine": false, "replaced": true, "d/theirs": true} {
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != there {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUndoOfAnotherDirectory(t *testing.T) {
	src, dir := t.TempDir(), filepath.Join(t.TempDir(), "d")
	write(t, src, "f", "1")
	layer, _ := capture(t, src)
	must(t, os.Mkdir(dir, 0o700))
	a := apply(t, layer, dir, Options{})
	must(t, os.Rename(dir, dir+"-moved"))
	write(t, dir, "f", "another")
	if err := a.Undo(); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(filepath.Join(dir, "f")); err != nil {
		t.Error(err)
	}
}

func TestRootIsNoSymlink(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "l")
	must(t, os.Symlink(dir, link))
	if _, err := Capture(context.Background(), io.Discard, link); err == nil {
		t.Error("captured through a symbolic link")
	}
	layer, _ := capture(t, dir)
	if a, err := Apply(context.Background(), bytes.NewReader(layer), link, Options{}); err == nil || a.Undo() != nil {
		t.Errorf("applied through a symbolic link: %v", err)
	}
}

// TestRandomTrees makes trees at random; a failure prints the seed.
func TestRandomTrees(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			dir, out := t.TempDir(), t.TempDir()
			randomTree(t, rand.New(rand.NewPCG(seed, 1)), dir, os.Geteuid() == 0)
			layer, _ := capture(t, dir)
			apply(t, layer, out, Options{AllowDevices: true})
			compare(t, describe(t, out), describe(t, dir))
		})
	}
}

func randomTree(t *testing.T, r *rand.Rand, dir string, root bool) {
	dirs, files := []string{dir}, []string(nil)
	all := []string{dir}
	name := func() string {
		b := make([]byte, 1+r.IntN(30))
		for i := range b {
			for b[i] = 0; b[i] == 0 || b[i] == '/'; {
				b[i] = byte(r.IntN(256))
			}
		}
		return filepath.Join(dirs[r.IntN(len(dirs))], "f"+string(b))
	}
	for range 5 + r.IntN(60) {
		p := name()
		if _, err := os.Lstat(p); err == nil {
			continue
		}
		switch k := r.IntN(8); {
		case k < 2:
			must(t, os.Mkdir(p, 0o755))
			dirs = append(dirs, p)
		case k == 2:
			must(t, os.Symlink(name(), p))
		case k == 3 && len(files) > 0:
			must(t, os.Link(files[r.IntN(len(files))], p))
		case k == 4 && root:
			mode, dev := uint32(unix.S_IFCHR), 0
			if r.IntN(2) == 0 {
				mode, dev = unix.S_IFBLK, int(unix.Mkdev(r.Uint32N(1<<12), r.Uint32N(1<<20)))
			}
			must(t, unix.Mknod(p, mode|0o600, dev))
		default:
			f, err := os.Create(p)
			must(t, err)
			for range r.IntN(4) {
				b := make([]byte, r.IntN(20000))
				for i := range b {
					b[i] = byte(r.Uint32())
				}
				_, err := f.WriteAt(b, r.Int64N(1<<20))
				must(t, err)
			}
			if r.IntN(3) == 0 {
				must(t, f.Truncate(r.Int64N(1<<21)))
			}
			must(t, f.Close())
			files = append(files, p)
		}
		all = append(all, p)
	}
	for _, p := range slices.Backward(all) {
		fi, err := os.Lstat(p)
		must(t, err)
		if root && r.IntN(2) == 0 {
			must(t, os.Lchown(p, r.IntN(1<<31), r.IntN(70000)))
		}
		if fi.Mode()&os.ModeSymlink == 0 {
			must(t, unix.Chmod(p, 0o700|r.Uint32N(0o10000)))
		}
		if fi.IsDir() || fi.Mode().IsRegular() {
			if r.IntN(3) == 0 {
				setxattr(t, p, "user.x", strings.Repeat("v", r.IntN(500)))
			}
			if root && r.IntN(4) == 0 {
				setxattr(t, p, xattrACLAccess, acl(r.Uint32N(70000), 5))
			}
			if root && fi.IsDir() && r.IntN(3) == 0 {
				setxattr(t, p, xattrACLDefault, acl(r.Uint32N(70000), 7))
				setxattr(t, p, "trusted.overlay.opaque", "y")
			}
			if root && fi.Mode().IsRegular() && r.IntN(4) == 0 {
				setxattr(t, p, "security.capability", capability(r.Uint32()&0xff))
			}
		}
		setMtime(t, p, time.Unix(r.Int64N(1<<32), r.Int64N(1e9)))
	}
}

// TestInheritedACL: a default ACL where the tree is made does not leak into it.
func TestInheritedACL(t *testing.T) {
	testenv.Need(t, testenv.Root)
	src, dir := t.TempDir(), t.TempDir()
	write(t, src, "d/f", "x")
	must(t, unix.Mkfifo(filepath.Join(src, "d/p"), 0o600))
	setxattr(t, dir, xattrACLDefault, acl(1000, 7))
	layer, _ := capture(t, src)
	apply(t, layer, dir, Options{SkipExisting: true})
	want := describe(t, src)[1:]
	compare(t, describe(t, dir)[1:], want)
}
