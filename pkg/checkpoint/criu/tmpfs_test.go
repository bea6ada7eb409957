package criu

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// dumpTmpfs archives a directory as CRIU does (criu/filesystems.c:tmpfs_dump).
func dumpTmpfs(t *testing.T, dir string) []byte {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	cmd := exec.Command("tar", "--create", "--gzip", "--no-unquote", "--no-wildcards", "--one-file-system", "--check-links",
		"--preserve-permissions", "--sparse", "--numeric-owner", "--directory", "/proc/self/fd/0", ".")
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = d, &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, &stderr)
	}
	return out
}

// archive makes the image of a tmpfs with these members.
func archive(t *testing.T, members ...*tar.Header) []byte {
	t.Helper()
	var b, plain bytes.Buffer
	z, w := gzip.NewWriter(&b), tar.NewWriter(&plain)
	for _, h := range members {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// The writer leaves out the records of sparse files.
	if _, err := z.Write(bytes.ReplaceAll(plain.Bytes(), []byte("GNU?sparse"), []byte("GNU.sparse"))); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// describeTree lists all that is below a directory, with what tar keeps of it.
func describeTree(t *testing.T, dir string) (lines []string) {
	t.Helper()
	first := map[uint64]string{}
	err := filepath.Walk(dir, func(name string, fi fs.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		st := fi.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%s %v %d:%d device %#x", rel, fi.Mode(), st.Uid, st.Gid, st.Rdev)
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			line += " -> " + target
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", b)
			if st.Nlink > 1 {
				if first[st.Ino] == "" {
					first[st.Ino] = rel
				}
				line += " is " + first[st.Ino]
			}
		}
		lines = append(lines, fmt.Sprintf("%s %d", line, fi.ModTime().Unix()))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// TestTmpfs: what tar has dumped is made again as it was.
func TestTmpfs(t *testing.T) {
	testenv.Need(t, testenv.Root)
	source := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(source, name) }
	must(os.MkdirAll(at("deep/er"), 0o755))
	must(os.Mkdir(at("shm"), 0o700))
	must(os.Chmod(at("shm"), 0o777|fs.ModeSticky))
	must(os.WriteFile(at("file"), []byte("content"), 0o640))
	must(os.WriteFile(at("empty"), nil, 0o000))
	must(os.WriteFile(at("deep/er/setuid"), []byte("x"), 0o755))
	must(os.Chown(at("deep/er/setuid"), 1234, 4321))
	must(os.Chmod(at("deep/er/setuid"), 0o755|fs.ModeSetuid))
	must(os.WriteFile(at("deep/"+strings.Repeat("n", 200)), []byte("long name"), 0o600))
	must(os.Link(at("file"), at("deep/other name")))
	must(os.Symlink("/proc/self/fd", at("fd")))
	must(os.Lchown(at("fd"), 7, 8))
	must(unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(os.Chmod(at("null"), 0o666))
	must(unix.Mknod(at("block"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 300))))
	must(unix.Mkfifo(at("fifo"), 0o622))
	for _, name := range []string{"file", "deep/er", "deep", "fifo", ""} {
		must(os.Chtimes(at(name), time.Time{}, time.Unix(1e9, 0)))
	}
	want := describeTree(t, source)
	if len(want) != 13 {
		t.Fatalf("the source has %q", want)
	}

	images := copyImages(t)
	write(t, images+"/tmpfs-dev-77.tar.gz.img", dumpTmpfs(t, source))
	mount := func(id uint32, f func(e *mnt.MntEntry)) *mnt.MntEntry {
		e := &mnt.MntEntry{Fstype: proto.Uint32(uint32(mnt.Fstype_TMPFS)), MntId: &id, RootDev: proto.Uint32(77), ParentMntId: proto.Uint32(1),
			Flags: proto.Uint32(0), Root: proto.String("/"), Mountpoint: proto.String("./dev"), Source: proto.String("tmpfs"), Options: proto.String("size=64k")}
		f(e)
		return e
	}
	root := mount(1, func(e *mnt.MntEntry) { e.Mountpoint, e.RootDev = proto.String("./"), proto.Uint32(5) })
	dev := mount(2, func(e *mnt.MntEntry) {})
	masked := mount(3, func(e *mnt.MntEntry) { e.Root, e.Mountpoint = proto.String("/null"), proto.String("./proc/kcore") })
	name := "/mountpoints-13.img"
	take := func(entries ...proto.Message) ([]Tmpfs, string, error) {
		t.Helper()
		write(t, images+name, encode(t, magicMounts, entries...))
		dir := viewOf(t, images)
		taken, err := TakeTmpfs(images, dir)
		return taken, dir, err
	}
	taken, dir, err := take(root, dev, masked)
	if err != nil || len(taken) != 1 || taken[0].Key != "stasis-tmpfs-2" || taken[0].Options != "size=64k" || taken[0].Source != "tmpfs" {
		t.Fatalf("taken: %+v, %v", taken, err)
	}
	given := proto.CloneOf(dev)
	given.ExtKey = proto.String("stasis-tmpfs-2")
	if got, _ := os.ReadFile(dir + name); !bytes.Equal(got, encode(t, magicMounts, root, given, masked)) {
		t.Errorf("mounts: %q", got)
	}
	if got, _ := os.ReadFile(images + name); !bytes.Equal(got, encode(t, magicMounts, root, dev, masked)) {
		t.Error("the original was changed")
	}
	to := t.TempDir()
	if err := taken[0].Fill(to); err != nil {
		t.Fatal(err)
	}
	if got := describeTree(t, to); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// Left to CRIU.
	for what, e := range map[string]*mnt.MntEntry{
		"shared":                  mount(2, func(e *mnt.MntEntry) { e.SharedId = proto.Uint32(4) }),
		"slave":                   mount(2, func(e *mnt.MntEntry) { e.MasterId = proto.Uint32(4) }),
		"external":                mount(2, func(e *mnt.MntEntry) { e.ExtKey = proto.String("/dev") }),
		"of a part":               mount(2, func(e *mnt.MntEntry) { e.Root = proto.String("/sub") }),
		"read-only":               mount(2, func(e *mnt.MntEntry) { e.SbFlags = proto.Uint32(unix.MS_RDONLY) }),
		"another file system":     mount(2, func(e *mnt.MntEntry) { e.Fstype = proto.Uint32(uint32(mnt.Fstype_PROC)) }),
		"without an image":        mount(2, func(e *mnt.MntEntry) { e.RootDev = proto.Uint32(78) }),
		"the root":                mount(2, func(e *mnt.MntEntry) { e.Mountpoint = proto.String("./") }),
		"options end at a zero":   mount(2, func(e *mnt.MntEntry) { e.Options = proto.String("a\x00b") }),
		"mounted in two places":   mount(3, func(e *mnt.MntEntry) { e.Mountpoint = proto.String("./other") }),
		"in a namespace of a pid": nil,
	} {
		entries := []proto.Message{root, e}
		switch what {
		case "mounted in two places":
			entries = append(entries, dev)
		case "in a namespace of a pid":
			write(t, images+"/mountpoints-14.img", encode(t, magicMounts, root))
			entries = []proto.Message{root, dev}
		}
		taken, dir, err := take(entries...)
		if err != nil || len(taken) != 0 {
			t.Errorf("%s: %+v, %v", what, taken, err)
		}
		if _, err := os.Readlink(dir + name); err != nil {
			t.Errorf("%s: the mounts are replaced", what)
		}
		os.Remove(images + "/mountpoints-14.img")
	}
	big := &tar.Header{Typeflag: tar.TypeReg, Name: "./big", Size: maxTmpfsBytes + 1}
	attribute := &tar.Header{Typeflag: tar.TypeReg, Name: "./a", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}, Format: tar.FormatPAX}
	bomb := &tar.Header{Typeflag: tar.TypeReg, Name: "./a", Format: tar.FormatPAX, PAXRecords: map[string]string{
		"GNU?sparse.size": "1099511627776", "GNU?sparse.numblocks": "1", "GNU?sparse.map": "0,0"}}
	var many []*tar.Header
	for i := range maxTmpfsFiles + 1 {
		many = append(many, &tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("./%d", i)})
	}
	for what, image := range map[string][]byte{
		"large": archive(t, big), "many": archive(t, many...), "attributes": archive(t, attribute), "bomb": archive(t, bomb), "compressed badly": make([]byte, maxTmpfsImage+1),
	} {
		write(t, images+"/tmpfs-dev-77.tar.gz.img", image)
		if taken, _, err := take(root, dev); err != nil || len(taken) != 0 {
			t.Errorf("%s: %+v, %v", what, taken, err)
		}
	}

	// Refused.
	whole := dumpTmpfs(t, source)
	for what, image := range map[string][]byte{
		"climbs":   archive(t, &tar.Header{Typeflag: tar.TypeReg, Name: "../x"}),
		"absolute": archive(t, &tar.Header{Typeflag: tar.TypeReg, Name: "/x"}),
		"no gzip":  []byte("0123456789abcdef0123456789"),
		"cut off":  whole[:len(whole)-20],
		"empty":    nil,
	} {
		write(t, images+"/tmpfs-dev-77.tar.gz.img", image)
		if taken, _, err := take(root, dev); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("%s: %+v, %v", what, taken, err)
		}
	}
	write(t, images+"/tmpfs-dev-77.tar.gz.img", whole)
	same := mount(3, func(e *mnt.MntEntry) { e.Root, e.ExtKey = proto.String("/x"), proto.String("stasis-tmpfs-2") })
	if taken, _, err := take(root, dev, same); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("another of the name: %+v, %v", taken, err)
	}
}

// TestTmpfsStaysInside: a link of the archive leads nothing out of the directory.
func TestTmpfsStaysInside(t *testing.T) {
	outside := t.TempDir()
	for what, f := range map[string]tmpfsFile{
		"file":   {header: &tar.Header{Typeflag: tar.TypeReg, Name: "out/file"}},
		"dir":    {header: &tar.Header{Typeflag: tar.TypeDir, Name: "out/dir"}},
		"fifo":   {header: &tar.Header{Typeflag: tar.TypeFifo, Name: "out/fifo"}},
		"link":   {header: &tar.Header{Typeflag: tar.TypeLink, Name: "link", Linkname: "out/there"}},
		"itself": {header: &tar.Header{Typeflag: tar.TypeReg, Name: "out"}},
		"parent": {header: &tar.Header{Typeflag: tar.TypeFifo, Name: "pipe/x"}}, // which nobody opens at its other end
		"pipe":   {header: &tar.Header{Typeflag: tar.TypeReg, Name: "pipe"}, content: []byte("x")},
	} {
		write(t, outside+"/there", []byte("as it was"))
		ts := Tmpfs{Key: "k", files: []tmpfsFile{{header: &tar.Header{Typeflag: tar.TypeSymlink, Name: "out", Linkname: outside, Uid: os.Getuid(), Gid: os.Getgid()}},
			{header: &tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Uid: os.Getuid(), Gid: os.Getgid()}}, f}}
		f.header.Uid, f.header.Gid, f.header.Mode = os.Getuid(), os.Getgid(), 0o600
		if err := ts.Fill(t.TempDir()); err == nil {
			t.Errorf("%s: no error", what)
		}
		if entries, _ := os.ReadDir(outside); len(entries) != 1 {
			t.Errorf("%s: outside there is %v", what, entries)
		}
	}
}
