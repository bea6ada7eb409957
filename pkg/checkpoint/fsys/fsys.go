// Package fsys is the small file system that the store is written against, so
// that its behaviour in a crash or on a failing disk can be tested.
//
// Invariants that each implementation keeps (the package's tests run one suite
// on all of them):
//
//   - No operation but SyncDir follows a symbolic link in the last part of a
//     path.
//   - What Create wrote is durable once File.Sync returned, its name once
//     SyncDir of its directory did. A rename is atomic: after a crash the old
//     or the new name is there, and SyncDir of either directory makes both
//     halves of it durable.
//   - Errors match fs.ErrNotExist and fs.ErrExist or are system error numbers.
//
// [OS] is the real thing. [Mem] lives in memory and can be cloned as a crash
// would leave it. [Hook] puts a function in front of each operation.
package fsys

import (
	"context"
	"io"
	"io/fs"
)

// FS is what the store needs of a file system. All methods may be called
// concurrently. Paths are absolute and clean.
type FS interface {
	// Mkdir makes one directory with exactly this mode, whatever the umask is.
	Mkdir(path string, mode fs.FileMode) error
	// Create makes a new regular file of exactly this mode for writing. It
	// fails with fs.ErrExist where anything has that name.
	Create(path string, mode fs.FileMode) (File, error)
	// Open opens a regular file for reading. It never blocks, and fails with
	// ErrNotRegular for everything else (ELOOP for a symbolic link).
	Open(path string) (File, error)
	// Lstat describes the path itself.
	Lstat(path string) (fs.FileInfo, error)
	// ReadDir lists a directory, sorted by name.
	ReadDir(path string) ([]fs.DirEntry, error)
	// Chmod changes the mode of a regular file or directory.
	Chmod(path string, mode fs.FileMode) error
	// Rename moves a file or directory; it fails with fs.ErrExist where
	// anything has the new name.
	Rename(from, to string) error
	// Remove removes a file or an empty directory.
	Remove(path string) error
	// RemoveAll removes a tree; it is no error if there is none.
	RemoveAll(path string) error
	// SyncDir makes the names in a directory durable.
	SyncDir(path string) error
	// Lock takes an exclusive lock on a regular file, which must exist. It
	// waits until it has the lock or ctx is done. The lock ends with Close or
	// with the process.
	Lock(ctx context.Context, path string) (io.Closer, error)
	// FreeBytes is what an unprivileged writer could still write.
	FreeBytes(path string) (int64, error)
}

// File is an open regular file.
type File interface {
	io.Reader
	io.Writer
	io.Closer
	// Sync makes content and mode durable. It works on a file that was opened
	// for reading too.
	Sync() error
}

// ErrNotRegular is what Open fails with for devices, pipes, sockets and
// directories.
var ErrNotRegular = errNotRegular{}

type errNotRegular struct{}

func (errNotRegular) Error() string { return "not a regular file" }
