package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// describe lists everything about a tree that must survive, one line for each
// path, by other means than the package's own.
func describe(t testing.TB, dir string) []string {
	t.Helper()
	var lines []string
	groups := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%q mode=%o owner=%d:%d mtime=%d.%09d", name, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size=%d sum=%x", st.Size, sha256.Sum256(data))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" target=%q", target)
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		// Whiteouts may or may not share an inode.
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0) {
			if groups[st.Ino] == "" {
				groups[st.Ino] = name
			}
			line += fmt.Sprintf(" links=%d first=%q", st.Nlink, groups[st.Ino])
		}
		for _, x := range attributes(t, p) {
			line += " " + x
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// attributes lists the extended attributes of a file but for those that an
// overlay keeps for itself.
func attributes(t testing.TB, p string) (out []string) {
	t.Helper()
	b := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, b)
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(string(b[:n]), "\x00") {
		switch strings.TrimPrefix(name, "trusted.overlay.") {
		case "", "origin", "impure", "nlink", "upper", "uuid":
			continue
		}
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(p, name, v)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, fmt.Sprintf("%q=%q", name, v[:n]))
	}
	slices.Sort(out)
	return out
}

func compare(t testing.TB, got, want []string) {
	t.Helper()
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("missing:    %s", l)
		}
	}
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("unexpected: %s", l)
		}
	}
}

func capture(t testing.TB, dir string) ([]byte, Stats) {
	t.Helper()
	var b bytes.Buffer
	stats, err := Capture(context.Background(), &b, dir)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), stats
}

func apply(t testing.TB, layer []byte, dir string, opt Options) Applied {
	t.Helper()
	a, err := Apply(context.Background(), bytes.NewReader(layer), dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// write makes a file and the directories above it.
func write(t testing.TB, dir, name, content string) string {
	t.Helper()
	p := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(content), 0o644))
	return p
}

func setxattr(t testing.TB, p, name, value string) {
	t.Helper()
	if err := unix.Lsetxattr(p, name, []byte(value), 0); err != nil {
		t.Fatalf("setxattr %s %s: %v", p, name, err)
	}
}

func setMtime(t testing.TB, p string, at time.Time) {
	t.Helper()
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: at.Unix(), Nsec: int64(at.Nanosecond())}}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW))
}

// acl encodes a POSIX ACL with a named user (kernel: posix_acl_xattr.h).
func acl(uid uint32, perm uint16) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{0x01, 6, ^uint32(0)}, {0x02, perm, uid}, {0x04, 4, ^uint32(0)}, {0x10, 7, ^uint32(0)}, {0x20, 4, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// capability is a file capability (struct vfs_cap_data, version 2).
func capability(bits uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, 0x02000001)
	b = binary.LittleEndian.AppendUint32(b, bits)
	return string(append(b, make([]byte, 12)...))
}

// writeAt copies a part of data to the same place in a file.
func writeAt(t testing.TB, p string, data []byte, off, n int) {
	t.Helper()
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(data[off:off+n], int64(off))
	must(t, err, f.Close())
}
