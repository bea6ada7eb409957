package layer

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func mkdirs(t testing.TB, base string, names ...string) []string {
	t.Helper()
	var out []string
	for _, n := range names {
		p := filepath.Join(base, n)
		must(t, os.Mkdir(p, 0o755))
		out = append(out, p)
	}
	return out
}

// TestOverlay changes a real overlay in the ways a container does, captures its
// upper directory while it is mounted, makes it again under a fresh overlay on
// the same lower directory, and compares what is seen through both.
func TestOverlay(t *testing.T) {
	testenv.Need(t, testenv.Root)
	for _, tt := range []struct {
		name, options string
		oci           bool // the layer can be said in OCI's terms
	}{
		{"containerd", "index=off", true},
		{"index", "index=on", true},
		{"redirect", "index=off,redirect_dir=on", false},
		{"metacopy", "index=off,redirect_dir=on,metacopy=on", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testenv.PrivateMounts(t)
			base := t.TempDir()
			d := mkdirs(t, base, "lower", "upper", "work", "merged", "upper2", "work2", "merged2")
			lower, upper, merged, upper2, merged2 := d[0], d[1], d[3], d[4], d[6]
			makeLower(t, lower)
			mount := func(upper, work, merged string) {
				testenv.Mount(t, "overlay", merged, "lowerdir="+lower+",upperdir="+upper+",workdir="+work+","+tt.options)
			}
			mount(upper, d[2], merged)
			changeTree(t, merged)
			layer, stats := capture(t, upper)
			if stats.Mounts != 0 || stats.Xattrs != 0 {
				t.Errorf("%+v", stats)
			}
			want := describe(t, merged)
			compare(t, describe(t, merged), want)

			before := describe(t, upper2)
			a := apply(t, layer, upper2, Options{})
			must(t, a.Undo())
			compare(t, describe(t, upper2), before)
			apply(t, layer, upper2, Options{})
			mount(upper2, d[5], merged2)
			compare(t, describe(t, merged2), want)
			// A restored container can go on changing its tree.
			must(t, os.RemoveAll(filepath.Join(merged2, "replaced-dir")), os.WriteFile(filepath.Join(merged2, "appended"), []byte("x"), 0o600))

			var diff bytes.Buffer
			err := WriteOCIDiff(context.Background(), &diff, bytes.NewReader(layer))
			if !tt.oci {
				if !errors.Is(err, checkpoint.ErrUnsupported) {
					t.Errorf("convert: %v", err)
				}
				return
			}
			must(t, err)
			// containerd itself unpacks the diff over a copy of the lower directory.
			flat := mkdirs(t, base, "flat")[0]
			l, _ := capture(t, lower)
			apply(t, l, flat, Options{})
			_, err = archive.Apply(context.Background(), flat, &diff)
			must(t, err)
			compare(t, withoutDirTimes(describe(t, flat)), withoutDirTimes(want))
		})
	}
}

// withoutDirTimes leaves out the times of directories, for which containerd makes
// no promise.
func withoutDirTimes(lines []string) (out []string) {
	for _, l := range lines {
		if strings.Contains(l, " mode=4") {
			before, after, _ := strings.Cut(l, " mtime=")
			_, after, _ = strings.Cut(after, " ")
			l = strings.TrimSpace(before + " " + after)
		}
		out = append(out, l)
	}
	return out
}

func makeLower(t *testing.T, dir string) {
	for _, n := range []string{
		"removed", "removed-dir/a", "removed-dir/b", "replaced-dir/old", "kept", "appended", "chmodded", "chowned", "linked", "renamed",
		"renamed-dir/sub/file", "file-to-dir", "dir-to-file/x", "partly/a", "partly/b", "partly/c", "large", "deep/er/file", "truncated",
	} {
		write(t, dir, n, strings.Repeat(n, 100))
	}
	must(t, os.Symlink("kept", filepath.Join(dir, "symlink-to-dir")), os.Truncate(filepath.Join(dir, "large"), 1<<20),
		os.Chmod(dir, 0o755))
	setxattr(t, filepath.Join(dir, "chmodded"), "user.lower", "yes")
}

func changeTree(t *testing.T, dir string) {
	p := func(n string) string { return filepath.Join(dir, n) }
	must(t, os.Remove(p("removed")), os.RemoveAll(p("removed-dir")))
	must(t, os.RemoveAll(p("replaced-dir")))
	write(t, dir, "replaced-dir/new", "new")
	f, err := os.OpenFile(p("appended"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("more")
	must(t, err, f.Close())
	must(t, os.Chmod(p("chmodded"), 0o4711), os.Chown(p("chowned"), 1000, 2000), os.Link(p("linked"), p("linked-again")))
	must(t, os.Rename(p("renamed"), p("partly/renamed")))
	if err := os.Rename(p("renamed-dir"), p("deep/moved")); err != nil && !errors.Is(err, unix.EXDEV) {
		t.Fatal(err)
	}
	must(t, os.Remove(p("file-to-dir")))
	write(t, dir, "file-to-dir/inside", "x")
	must(t, os.RemoveAll(p("dir-to-file")))
	write(t, dir, "dir-to-file", "x")
	must(t, os.Remove(p("partly/a")), os.Remove(p("partly/b")))
	must(t, os.Remove(p("symlink-to-dir")), os.Mkdir(p("symlink-to-dir"), 0o1777))
	must(t, os.Truncate(p("truncated"), 5))
	for _, n := range []string{"new/1", "new/2"} {
		write(t, dir, n, n)
		must(t, os.Link(p(n), p(n+"-link")))
	}
	must(t, os.Remove(p("new/2")))
	write(t, dir, "hole", "x")
	must(t, os.Truncate(p("hole"), 5<<20), unix.Mkfifo(p("fifo"), 0o600), os.Symlink("kept", p("symlink")))
	write(t, dir, "capable", "x")
	setxattr(t, p("capable"), "security.capability", capability(1<<10))
	setxattr(t, p("kept"), "user.added", "v")
	setMtime(t, p("new/1"), time.Unix(1e9, 123456789))
	setMtime(t, p("deep"), time.Unix(1e9, 5))
	setMtime(t, p("."), time.Unix(1e9, 6))
}

// TestUpper checks the parts of a captured upper directory that a merged view
// does not show.
func TestUpper(t *testing.T) {
	testenv.PrivateMounts(t)
	d := mkdirs(t, t.TempDir(), "lower", "upper", "work", "merged", "upper2")
	for _, n := range []string{"a", "b", "c", "opaque/x"} {
		write(t, d[0], n, n)
	}
	testenv.Mount(t, "overlay", d[3], "lowerdir="+d[0]+",upperdir="+d[1]+",workdir="+d[2]+",index=off")
	for _, n := range []string{"a", "b", "opaque"} {
		must(t, os.RemoveAll(filepath.Join(d[3], n)))
	}
	must(t, os.Mkdir(filepath.Join(d[3], "opaque"), 0o755), os.WriteFile(filepath.Join(d[3], "c"), nil, 0o600))
	layer, _ := capture(t, d[1])
	dec, err := newDecoder(bytes.NewReader(layer))
	must(t, err)
	seen := map[string]*entry{}
	for {
		e, err := dec.next()
		if err != nil {
			break
		}
		seen[e.name] = e
	}
	if !seen["a"].whiteout() || !seen["b"].whiteout() {
		t.Error("whiteouts are not entries of their own")
	}
	if v, _ := seen["opaque"].xattr("trusted.overlay.opaque"); v != "y" {
		t.Errorf("opaque: %q", v)
	}
	for name, e := range seen {
		for _, x := range e.xattrs {
			if x.name != "trusted.overlay.opaque" {
				t.Errorf("%s has %s", name, x.name)
			}
		}
	}
	apply(t, layer, d[4], Options{})
	compare(t, describe(t, d[4]), describe(t, d[1]))
}

func TestMountsAreLeftOut(t *testing.T) {
	testenv.PrivateMounts(t)
	dir, out := t.TempDir(), t.TempDir()
	write(t, dir, "m/hidden", "x")
	write(t, dir, "z", "x")
	testenv.Mount(t, "tmpfs", filepath.Join(dir, "m"), "size=64k")
	write(t, dir, "m/mounted", "x")
	layer, stats := capture(t, dir)
	if stats.Mounts != 1 || stats.Entries != 2 {
		t.Errorf("%+v", stats)
	}
	// Nor does Apply make anything in another mount.
	write(t, out, "m/f", "x")
	inside, _ := capture(t, out)
	if a, err := Apply(context.Background(), bytes.NewReader(inside), dir, Options{SkipExisting: true}); !errors.Is(err, unix.EXDEV) {
		t.Errorf("%v", err)
	} else {
		must(t, a.Undo())
	}
	apply(t, layer, t.TempDir(), Options{})
}

// TestNoSpace fills a real file system, with bytes and with inodes.
func TestNoSpace(t *testing.T) {
	testenv.Need(t, testenv.Root)
	src := t.TempDir()
	for _, n := range []string{"a/1", "a/2", "b/1", "b/2"} {
		write(t, src, n, strings.Repeat("x", 1<<20))
	}
	setxattr(t, src, "user.root", "yes")
	layer, _ := capture(t, src)
	for name, options := range map[string]string{"bytes": "size=3m", "inodes": "size=100m,nr_inodes=6"} {
		for _, opt := range []Options{{}, {SkipExisting: true}} {
			t.Run(name, func(t *testing.T) {
				testenv.PrivateMounts(t)
				dir := t.TempDir()
				testenv.Mount(t, "tmpfs", dir, options)
				write(t, dir, "old", "old")
				setMtime(t, dir, time.Unix(1e9, 1))
				before := describe(t, dir)
				a, err := Apply(context.Background(), bytes.NewReader(layer), dir, opt)
				if !errors.Is(err, unix.ENOSPC) {
					t.Errorf("%v", err)
				}
				if a.Entries == 0 {
					t.Error("nothing was made before the end")
				}
				must(t, a.Undo())
				compare(t, describe(t, dir), before)
			})
		}
	}
}

// TestReadOnly: an error other than a full disk is passed on as well.
func TestReadOnly(t *testing.T) {
	testenv.PrivateMounts(t)
	src, dir := t.TempDir(), t.TempDir()
	write(t, src, "f", "x")
	layer, _ := capture(t, src)
	testenv.Mount(t, "tmpfs", dir, "ro")
	a, err := Apply(context.Background(), bytes.NewReader(layer), dir, Options{SkipExisting: true})
	if !errors.Is(err, unix.EROFS) {
		t.Errorf("%v", err)
	}
	must(t, a.Undo())
}
